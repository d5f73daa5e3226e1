"""The whole pipeline in one call: calibrate, score, search, compact, evaluate."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.calibrate import calibrate
from saap.compact import compact
from saap.criteria import Criterion, score
from saap.evaluate import Evaluation, evaluate
from saap.micro_batches import Progress
from saap.plan import Plan
from saap.scores import Scores
from saap.search import check_ratio, search
from saap.statistics import Statistics
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
    multiple: int = 32,
    protect: Iterable[int] = (),
    ratio_of: str = "model",
    uniform: bool = False,
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
    """Remove ``ratio`` of the model's parameters; the model is changed in place and returned.

    ``statistics`` from an earlier ``calibrate`` of this model replaces ``data``. ``eval_text`` (what
    ``evaluate`` takes) is evaluated on the dense and then on the pruned model. The other arguments
    are those of ``calibrate``, ``score`` and ``search``. Raises ValueError before calibration when the
    ratio cannot be reached or the statistics belong to another model.
    """
    units = discover(model)
    options: dict[str, Any] = {
        "ratio_of": ratio_of,
        "multiple": multiple,
        "protect": tuple(protect),
        "uniform": uniform,
        "method": method,
    }
    check_ratio(units, ratio, **options)
    watch, evaluation = Stopwatch(), None
    if statistics is None:
        with watch("calibrate"):
            statistics = calibrate(
                model, tokenizer, data, samples=samples, seq_len=seq_len, batch_size=batch_size,
                checkpoint=checkpoint, backend=backend, seed=seed, stream=stream, progress=progress,
            )  # fmt: skip
    statistics.check_model(units)
    with watch("score"):
        scores = score(statistics, criterion)
    with watch("search"):
        plan = search(scores, ratio, **options)
    if eval_text is not None:
        with watch("evaluate"):
            evaluation = evaluate(model, tokenizer, eval_text)
    with watch("compact"):
        compact(model, plan)
    if eval_text is not None:
        with watch("evaluate"):
            evaluation = evaluate(model, tokenizer, eval_text, against=evaluation)
    return PruneResult(model, plan, statistics, evaluation, scores, watch.seconds)
