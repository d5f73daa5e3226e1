"""The whole pipeline in one call: calibrate, score, search, compact, evaluate."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.calibrate import calibrate
from saap.compact import compact
from saap.compensate import check_compensate, compensation
from saap.criteria import Criterion, score
from saap.evaluate import Evaluation, evaluate
from saap.micro_batches import Progress
from saap.plan import Plan
from saap.search import check_ratio, search
from saap.statistics import Statistics
from saap.stream import Streaming
from saap.units import discover


@dataclass(frozen=True)
class PruneResult:
    """A pruned model, the plan and statistics that led to it, and its evaluation if text was given."""

    model: PreTrainedModel
    plan: Plan
    statistics: Statistics
    evaluation: Evaluation | None


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
    compensate: str = "none",
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

    ``statistics`` from an earlier ``calibrate`` of this model replaces ``data``. ``compensate`` "bias" or
    "least_squares" makes up for what is removed by ``compensation`` on ``data``, which is then needed with
    statistics too. ``eval_text`` (what ``evaluate`` takes) is evaluated on the dense and then on the pruned
    model. The other arguments are those of ``calibrate``, ``score`` and ``search``; ``progress`` counts
    calibration, then compensation. Raises ValueError before calibration when the ratio cannot be reached or
    the statistics belong to another model.
    """
    units = discover(model)
    check_compensate(compensate, data)
    if isinstance(data, Iterator):
        data = list(data)  # read twice
    options: dict[str, Any] = {
        "ratio_of": ratio_of,
        "multiple": multiple,
        "protect": tuple(protect),
        "uniform": uniform,
        "method": method,
    }
    check_ratio(units, ratio, **options)
    if statistics is None:
        statistics = calibrate(
            model, tokenizer, data, samples=samples, seq_len=seq_len, batch_size=batch_size,
            checkpoint=checkpoint, backend=backend, seed=seed, stream=stream, progress=progress,
        )  # fmt: skip
    statistics.check_model(units)
    plan = search(score(statistics, criterion), ratio, **options)
    dense = None if eval_text is None else evaluate(model, tokenizer, eval_text)
    found = None
    if compensate != "none":
        found = compensation(
            model, plan, tokenizer, data, method=compensate, samples=samples, seq_len=seq_len,
            batch_size=batch_size, seed=seed, stream=stream, progress=progress,
        )  # fmt: skip
    compact(model, plan, found)
    evaluation = None if eval_text is None else evaluate(model, tokenizer, eval_text, against=dense)
    return PruneResult(model, plan, statistics, evaluation)
