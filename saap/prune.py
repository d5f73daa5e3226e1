"""The whole pipeline in one call: calibrate, score, search, compensate, compact, tune, evaluate."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.compensate import check_compensate, refuse_experts
from saap.criteria import Criterion, check_criterion, check_statistics
from saap.data import pack_for
from saap.evaluate import Evaluation, evaluate
from saap.micro_batches import Progress
from saap.plan import Plan
from saap.resources import Resource, named_resource
from saap.scores import Scores
from saap.search import check_ratio
from saap.serving.targets import check_config
from saap.statistics import Statistics
from saap.steps import Recipe, prune_in_steps
from saap.stopwatch import Stopwatch
from saap.stream import Streaming
from saap.units import discover


@dataclass(frozen=True)
class PruneResult:
    """A pruned model, what led to it, its evaluation if text was given, and seconds by stage (``timings``)."""

    model: PreTrainedModel
    plan: Plan
    statistics: Statistics
    evaluation: Evaluation | None
    scores: Scores | None = None
    timings: dict[str, float] = field(default_factory=dict)


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    *,
    ratio: float,
    criterion: str | Criterion = "saap",
    method: str = "global",
    fluctuation_weight: float = 0.5,
    multiple: int | None = None,
    protect: Iterable[int] = (),
    ratio_of: str = "model",
    resource: str | Resource = "parameters",
    uniform: bool = False,
    allow_empty: bool = False,
    keep_experts: int | None = None,
    tensor_parallel: int = 1,
    target: str | None = None,
    compensate: str = "none",
    compensation_inputs: str = "auto",
    compensated_scores: bool | str = "auto",
    steps: int = 1,
    step_samples: int | None = None,
    recover_tokens: int | None = None,
    samples: int = 128,
    seq_len: int = 512,
    batch_size: int | str = "auto",
    checkpoint: bool | str = "auto",
    backend: str | None = None,
    seed: int = 0,
    stream: bool | str | Streaming = "auto",
    statistics: Statistics | None = None,
    eval_text: Any = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Remove ``ratio`` of the model's parameters, or of another ``resource``; the model is changed and returned.

    ``statistics`` from an earlier ``calibrate`` of this model replaces ``data``. ``steps`` above 1 removes the
    ratio in that many equal steps and calibrates again after each; with ``step_samples`` on so many new sequences,
    added to what is left of the statistics before. ``compensate`` "bias" or "least_squares" makes up for what a step
    removes by ``compensation`` with inputs ``compensation_inputs``; with ``compensated_scores``, by "auto" for least
    squares and criterion "saap" where there is text enough, the search goes by what least squares cannot make up for.
    ``recover_tokens`` of ``data``, shared equally by the steps, tune the model after each by LoRA, merged into its
    weights, on what the dense model predicts, of which a copy is kept meanwhile (pip install 'saap[recover]').
    All need ``data`` with statistics too. ``eval_text`` (what ``evaluate`` takes) is evaluated on the dense and then on
    the pruned model. The other arguments are those of ``calibrate``, ``score`` and ``search``; ``progress`` counts as
    ``prune_in_steps`` says.
    Raises ValueError before calibration when the ratio cannot be reached or the statistics belong to another model.
    """
    units = discover(model)
    recipe = Recipe(
        criterion,
        {
            "ratio_of": ratio_of, "resource": resource, "multiple": multiple, "protect": tuple(protect),
            "uniform": uniform, "allow_empty": allow_empty, "method": method, "fluctuation_weight": fluctuation_weight,
            "keep_experts": keep_experts, "tensor_parallel": tensor_parallel, "target": target,
        },
        {
            "samples": samples, "seq_len": seq_len, "batch_size": batch_size, "checkpoint": checkpoint,
            "backend": backend, "seed": seed, "stream": stream,
        },
        compensate, steps, compensation_inputs, step_samples, compensated_scores, recover_tokens,
    )  # fmt: skip
    check_compensate(compensate, data, compensation_inputs)
    refuse_experts(units, compensate, compensation_inputs)
    check_criterion(criterion, method)
    recipe.check_coupled(given=statistics is not None)
    check_ratio(units, ratio, **recipe.search)
    check_config(target, model.config, compensate)
    named_resource(resource).warn_of_dtype(model.dtype)
    if steps > 1 and data is None:
        raise ValueError(f"steps={steps} calibrates again after every step: expected data, got none")
    if recover_tokens is not None and data is None:
        raise ValueError("recover_tokens tunes the model on text: expected data, got none")
    if statistics is not None:
        statistics.check_model(units)
        check_statistics(statistics, criterion)
    if isinstance(data, Iterator):
        data = list(data)  # read more than once
    if isinstance(eval_text, Iterator):
        eval_text = list(eval_text)
    recipe.tuning(model, units, tokenizer, data)  # refused now or never
    watch, evaluation = Stopwatch(), None
    if eval_text is not None:
        if statistics is None:
            pack_for(model, tokenizer, data, samples=samples, seq_len=seq_len, seed=seed)  # refused now or never
        with watch("evaluate"):
            evaluation = evaluate(model, tokenizer, eval_text)
    done = prune_in_steps(
        model, tokenizer, data, ratio, recipe, statistics=statistics, watch=watch, progress=progress
    )  # fmt: skip
    if eval_text is not None:
        with watch("evaluate"):
            evaluation = evaluate(model, tokenizer, eval_text, against=evaluation)
    return PruneResult(model, done.plan, done.statistics, evaluation, done.scores, watch.seconds)
