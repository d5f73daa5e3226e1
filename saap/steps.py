"""Pruning in one or several steps: calibrate, score, search, compensate, compact, and again on what is left."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.calibrate import calibrate
from saap.compact import PLAN_ATTRIBUTE, compact
from saap.compensate import compensation
from saap.criteria import Criterion, score
from saap.micro_batches import Progress
from saap.plan import Plan
from saap.resources import named_resource
from saap.scores import Scores
from saap.search import search
from saap.statistics import Statistics
from saap.stopwatch import Stopwatch
from saap.units import Units, discover

COMPENSATION_OPTIONS = ("samples", "seq_len", "batch_size", "seed", "stream")  # those that calibration has too


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned: arguments of ``score``, ``search``, ``calibrate`` and ``compensation``, and the steps."""

    criterion: str | Criterion = "saap"
    search: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    compensate: str = "none"
    steps: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a positive integer; got {self.steps!r}")


@dataclass(frozen=True)
class Stepped:
    """The pruned model and its plan, numbered as in the dense model; statistics and scores are of the first step."""

    model: PreTrainedModel
    plan: Plan
    statistics: Statistics
    scores: Scores


def prune_in_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Any,
    ratio: float,
    recipe: Recipe,
    *,
    statistics: Statistics | None = None,
    copy: bool = False,
    watch: Stopwatch | None = None,
    progress: Progress | None = None,
) -> Stepped:
    """Remove ``ratio`` in equal steps, in place or from a ``copy``; every step after the first calibrates anew.

    After step s of n the model has 1 - ratio * s / n of the dense one's resource left. ``statistics``, if
    given, serve the first step. ``progress(done, total)`` counts a stage's own work where there is only one,
    otherwise thousandths of all calibrations and compensations. What the arguments must be is up to the
    functions they go to, whose errors come through before the model is changed for the first time.
    """
    units, watch = discover(model), watch or Stopwatch()
    counted = _shares(progress, recipe, statistics is not None)
    done: Stepped | None = None
    for step in range(1, recipe.steps + 1):
        if statistics is None:
            with watch("calibrate"):
                statistics = calibrate(model, tokenizer, data, **recipe.calibration, progress=next(counted))
        statistics.check_model(discover(model))
        with watch("score"):
            scores = score(statistics, recipe.criterion)
        with watch("search"):
            plan = search(scores, **_share(units, ratio, step, recipe), **recipe.search)
        found = None
        if recipe.compensate != "none":
            options = {name: value for name, value in recipe.calibration.items() if name in COMPENSATION_OPTIONS}
            with watch("compensate"):
                found = compensation(
                    model, plan, tokenizer, data, method=recipe.compensate, **options, progress=next(counted)
                )
        with watch("compact"):
            model = compact(model, plan, found, copy=copy and step == 1)
        plan = getattr(model, PLAN_ATTRIBUTE)  # with the settings of its compensation
        done = Stepped(model, plan, statistics, scores) if done is None else _followed(done, plan)
        statistics = None
    assert done is not None  # there is a step at least
    if recipe.steps > 1:
        settings = done.plan.settings | {"ratio": ratio, "budget": None, "steps": recipe.steps}
        done = Stepped(model, Plan(units, done.plan.layers, settings), done.statistics, done.scores)
        object.__setattr__(model, PLAN_ATTRIBUTE, done.plan)
    return done


def _followed(done: Stepped, plan: Plan) -> Stepped:
    return Stepped(done.model, done.plan.then(plan), done.statistics, done.scores)


def _share(units: Units, ratio: float, step: int, recipe: Recipe) -> dict[str, Any]:
    """What a search is asked for in a step: the ratio, or what of the dense model may be left."""
    if recipe.steps == 1:
        return {"ratio": ratio}
    resource = named_resource(recipe.search.get("resource", "parameters"))
    whole = resource.whole(units, recipe.search.get("ratio_of", "model"))
    return {"budget": whole * (1 - ratio * step / recipe.steps)}


def _shares(progress: Progress | None, recipe: Recipe, measured: bool) -> Iterator[Progress | None]:
    """The progress of each stage in turn, as its share of that of all stages."""
    stages = recipe.steps * (2 if recipe.compensate != "none" else 1) - measured
    for stage in range(stages):
        if progress is None or stages == 1:
            yield progress
        else:
            yield partial(_report, progress, stage, stages)


def _report(progress: Progress, stage: int, stages: int, done: int, total: int) -> None:
    progress(int(1000 * (stage + done / total)), 1000 * stages)
