"""What other criteria would have made of the same model from the same statistics, by the same recipe."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.evaluate import Evaluation, evaluate
from saap.micro_batches import Progress
from saap.statistics import Statistics
from saap.steps import Recipe, prune_in_steps


def evaluate_baselines(
    names: Iterable[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Any,
    data: Any,
    statistics: Statistics,
    ratio: float,
    recipe: Recipe,
    progress: Progress | None = None,
) -> list[tuple[str, Evaluation]]:
    """Prune a copy of the dense ``model`` by each criterion in turn and evaluate it on ``text``.

    One copy exists at a time; ``model`` is left alone. Everything but the criterion is as ``recipe`` says,
    compensation and steps included; ``compensated_scores`` "auto" is off for most. Raises what ``prune_in_steps`` and
    ``evaluate`` raise.
    """
    found = []
    for name in names:
        other = replace(recipe, criterion=name)
        pruned = prune_in_steps(model, tokenizer, data, ratio, other, statistics=statistics, copy=True).model
        found.append((name, evaluate(pruned, tokenizer, text, progress=progress)))
    return found
