"""What other criteria would have made of the same model from the same statistics, at the same ratio."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.compact import compact
from saap.criteria import CRITERIA, score
from saap.evaluate import Evaluation, evaluate
from saap.micro_batches import Progress
from saap.search import search
from saap.statistics import Statistics


def check_baselines(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is no criterion."""
    for name in names:
        if name not in CRITERIA:
            raise ValueError(f"unknown baseline {name!r}; known: {', '.join(CRITERIA)}")


def evaluate_baselines(
    names: Iterable[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Any,
    statistics: Statistics,
    ratio: float,
    search_options: dict[str, Any],
    progress: Progress | None = None,
) -> list[tuple[str, Evaluation]]:
    """Prune a copy of the dense ``model`` by each criterion in turn and evaluate it on ``text``.

    One copy exists at a time; ``model`` is left alone. ``search_options`` are those of ``search``, so that the
    criteria differ and nothing else. Raises what ``score``, ``search`` and ``evaluate`` raise.
    """
    found = []
    for name in names:
        plan = search(score(statistics, name), ratio, **search_options)
        found.append((name, evaluate(compact(model, plan, copy=True), tokenizer, text, progress=progress)))
    return found
