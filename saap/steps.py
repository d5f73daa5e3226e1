"""Pruning in one or several steps: calibrate, score, search, compensate, compact, and again on what is left."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.calibrate import calibrate, check_coupled
from saap.compact import PLAN_ATTRIBUTE, compact
from saap.compensate import Compensation, compensation
from saap.compensated_scores import ENOUGH, compensated_scores, tokens_per_input
from saap.criteria import Criterion, needs_coupled, score
from saap.micro_batches import Progress
from saap.plan import Plan
from saap.recovery.interleave import Tuning, check_tokens
from saap.resources import named_resource
from saap.scores import Scores
from saap.search import search
from saap.stages import Stages
from saap.statistics import Statistics
from saap.stopwatch import Stopwatch
from saap.units import Units, discover
from saap.warm_statistics import Sequences, left_after

COMPENSATION_OPTIONS = ("samples", "seq_len", "batch_size", "seed", "stream")  # those that calibration has too
WITHOUT_LOSS = ("random", "block_influence")  # criteria of no unit's own output


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned: arguments of ``score``, ``search``, ``calibrate`` and ``compensation``, and the steps.

    With ``step_samples`` statistics stay warm: every step after the first measures that many new sequences, packed
    behind those of the steps before, and adds them to what pruning left of the statistics so far. Otherwise each
    step calibrates from nothing on the sequences of the first. ``compensated_scores`` has the search go by what
    least squares cannot make up for; "auto" does where it was measured to help: criterion "saap", ranked
    globally or uniformly, with at least ``ENOUGH`` tokens of text for every input of the dense model's widest o
    or down. ``recover_tokens`` of the calibration text, shared equally by the steps, tune what each step leaves by
    LoRA, merged, after the dense model, of which a copy is kept meanwhile.
    """

    criterion: str | Criterion = "saap"
    search: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    compensate: str = "none"
    steps: int = 1
    compensation_inputs: str = "auto"
    step_samples: int | None = None
    compensated_scores: bool | str = "auto"
    recover_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.compensated_scores != "auto" and not isinstance(self.compensated_scores, bool):
            raise ValueError(f'compensated_scores must be True, False or "auto"; got {self.compensated_scores!r}')
        if self.compensated_scores is True and self.compensate != "least_squares":
            raise ValueError(
                "compensated_scores are for what least squares makes up for: expected compensate "
                f"'least_squares', got {self.compensate!r}"
            )
        if self.compensated_scores is True and self.criterion in WITHOUT_LOSS:
            raise ValueError(
                f"compensated_scores need a criterion that says what removing a unit costs; {self.criterion} does not"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a positive integer; got {self.steps!r}")
        if self.recover_tokens is not None:
            if self.step_samples is not None:
                raise ValueError(
                    "step_samples keeps the statistics of the steps before, which are of other weights than those that "
                    "recover_tokens leaves: give one of the two"
                )
            check_tokens(self.recover_tokens, self.steps, self.calibration.get("seq_len", 512))
        if self.step_samples is None:
            return
        if isinstance(self.step_samples, bool) or not isinstance(self.step_samples, int) or self.step_samples < 1:
            raise ValueError(f"step_samples must be a positive integer; got {self.step_samples!r}")
        if self.steps == 1:
            raise ValueError("step_samples is for the steps after the first: expected steps above 1, got 1")
        if self.coupled:
            raise ValueError(
                "step_samples adds to the statistics before, which coupled ones do not allow; criterion "
                f"{self.criterion!r} with steps measures all samples again after each, without step_samples"
            )

    @property
    def coupled(self) -> bool:
        """Whether calibration measures coupled statistics: asked to, or because the criterion reads them."""
        return bool(self.calibration.get("coupled")) or needs_coupled(self.criterion)

    def kinds(self, units: Units) -> tuple[str, ...]:
        """The stages of a step that take long, of a dense model with ``units``."""
        scores = ("score",) if self.compensates_scores(units) else ()
        tuned = () if self.recover_tokens is None else ("recover",)
        return ("calibrate", *scores, *(() if self.compensate == "none" else ("compensate",)), *tuned)

    def tuning(
        self, model: PreTrainedModel, units: Units, tokenizer: PreTrainedTokenizerBase | None, data: Any
    ) -> Tuning | None:
        """How a dense ``model`` is tuned after each step; ValueError for one that cannot be, or for its text."""
        if self.recover_tokens is None:
            return None
        return Tuning.of(model, units, tokenizer, data, self.recover_tokens, self.steps, self.calibration)

    def check_coupled(self, given: bool) -> None:
        """Raise ValueError when coupled statistics cannot be measured as asked; ``given`` serve the first step."""
        if self.coupled and (self.steps > 1 or not given):
            samples = self.calibration.get("samples", 128)
            check_coupled(samples, self.calibration.get("batch_size", "auto"))

    def compensates_scores(self, units: Units) -> bool:
        """Whether the search goes by compensated scores, in all steps alike, of a dense model with ``units``."""
        if self.compensated_scores == "auto":
            return self.gains_given_text and self.tokens_per_input(units) >= ENOUGH
        return bool(self.compensated_scores)

    @property
    def gains_given_text(self) -> bool:
        """Whether compensated scores were measured to help where there is text enough."""
        ranked = self.search.get("method", "global") in ("global", "uniform")
        return self.criterion == "saap" and ranked and self.compensate == "least_squares"

    def tokens_per_input(self, units: Units) -> float:
        """Calibration text for every input, as ``saap.compensated_scores`` counts it."""
        return tokens_per_input(units, self.calibration.get("samples", 128) * self.calibration.get("seq_len", 512))

    @property
    def text_options(self) -> dict[str, Any]:
        """What ``compensated_scores`` and ``compensation`` are given of the calibration's options."""
        return {name: value for name, value in self.calibration.items() if name in COMPENSATION_OPTIONS}

    def scores(
        self, statistics: Statistics, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: Any,
        units: Units, progress: Progress | None = None,
    ) -> Scores:  # fmt: skip
        """What the search goes by: the criterion's scores, or what of them least squares cannot make up for.

        ``units`` are those of the dense model. Settings say which, where its text for every input may have decided.
        """
        found, compensates = score(statistics, self.criterion), self.compensates_scores(units)
        if compensates:
            found = compensated_scores(found, model, tokenizer, data, **self.text_options, progress=progress)
        elif self.compensated_scores != "auto" or not self.gains_given_text:
            return found
        why = {"compensated_scores": compensates, "tokens_per_input": self.tokens_per_input(units)}
        return replace(found, settings=found.settings | why)


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
    scores: Scores | None = None,
    copy: bool = False,
    watch: Stopwatch | None = None,
    progress: Progress | Stages | None = None,
) -> Stepped:
    """Remove ``ratio`` in equal steps, in place or from a ``copy``; every step after the first calibrates anew.

    After step s of n the model has at most 1 - ratio * s / n of the dense one's resource left; a step for which
    the steps before removed enough is left out. ``statistics``, if given, serve the first step, and so do ``scores``
    beside them, of an earlier call with another ratio.
    ``progress(done, total)`` counts a stage's own work where there is only one, otherwise thousandths of all
    stages that take long; ``Stages`` of this recipe go on where they are. What the arguments must be is up
    to the functions they go to, whose errors come through before the model is changed for the first time.
    """
    recipe.check_coupled(given=statistics is not None)
    units, watch = discover(model), watch or Stopwatch()
    sequences, left, tuning = None, None, recipe.tuning(model, units, tokenizer, data)
    teacher = None if tuning is None else model if copy else deepcopy(model)
    if recipe.step_samples is not None:
        known = 0 if statistics is None else statistics.sequences
        sequences = Sequences.of(model, tokenizer, data, recipe.calibration, recipe.steps, recipe.step_samples, known)
    given = statistics is not None
    stages = progress if isinstance(progress, Stages) else Stages(recipe.steps, recipe.kinds(units), given, progress)
    done: Stepped | None = None
    for step in range(1, recipe.steps + 1):
        share = _share(units, ratio, step, recipe)
        if done is not None and _reached(done.model, share, recipe):
            continue  # an earlier step had to remove more than its share
        if statistics is None:
            with watch("calibrate"):
                counted = stages.of(step, "calibrate")
                statistics = _calibrated(model, tokenizer, data, recipe, sequences, step, left, counted)
        stages.say(step, "prune")
        statistics.check_model(discover(model))
        if scores is None:
            with watch("score"):
                counted = stages.of(step, "score") if recipe.compensates_scores(units) else None
                scores = recipe.scores(statistics, model, tokenizer, data, units, counted)
        with watch("search"):
            plan = search(scores, **share, **recipe.search)
        found = _compensated(model, tokenizer, data, plan, recipe, watch, stages, step)
        with watch("compact"):
            model = compact(model, plan, found, copy=copy and step == 1)
        if tuning is not None and teacher is not None:
            with watch("recover"):
                model = tuning.after(step, model, teacher, stages.of(step, "recover"))
        left = None if sequences is None else left_after(statistics, plan, discover(model))
        plan = getattr(model, PLAN_ATTRIBUTE)  # with the settings of its compensation
        done = Stepped(model, plan, statistics, scores) if done is None else _followed(done, plan)
        statistics = scores = None
    stages.end()
    assert done is not None  # there is a step at least
    return done if recipe.steps == 1 and tuning is None else _as_one(done, units, ratio, recipe, sequences, tuning)


def _as_one(
    done: Stepped, units: Units, ratio: float, recipe: Recipe, sequences: Sequences | None, tuning: Tuning | None
) -> Stepped:
    """With a plan that says what all steps together were asked for, on the model too."""
    settings = dict(done.plan.settings)
    settings |= {} if recipe.steps == 1 else {"ratio": ratio, "budget": None, "steps": recipe.steps}
    settings |= {} if sequences is None else {"step_samples": sequences.each}
    settings |= {} if tuning is None else {"recover_tokens": recipe.recover_tokens} | tuning.described
    plan = Plan(units, done.plan.layers, settings)
    object.__setattr__(done.model, PLAN_ATTRIBUTE, plan)
    return Stepped(done.model, plan, done.statistics, done.scores)


def _calibrated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: Any, recipe: Recipe,
    sequences: Sequences | None, step: int, left: Statistics | None, progress: Progress | None,
) -> Statistics:  # fmt: skip
    """Statistics of a step: from nothing, or what is ``left`` of the ones before and new sequences."""
    if sequences is None:
        options = recipe.calibration | {"coupled": recipe.coupled}
        return calibrate(model, tokenizer, data, **options, progress=progress)
    ids = sequences.of_step(step)
    options = recipe.calibration | {"samples": len(ids), "seq_len": ids.shape[1]}
    found = calibrate(model, None, ids, **options, progress=progress)
    return found if left is None else found.merge(left)


def _compensated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: Any, plan: Plan, recipe: Recipe,
    watch: Stopwatch, stages: Stages, step: int,
) -> Compensation | None:  # fmt: skip
    if recipe.compensate == "none":
        return None
    options = recipe.text_options | {"method": recipe.compensate, "inputs": recipe.compensation_inputs}
    with watch("compensate"):
        found = compensation(model, plan, tokenizer, data, **options, progress=stages.of(step, "compensate"))
    stages.say(step, "prune")
    return found


def _followed(done: Stepped, plan: Plan) -> Stepped:
    return Stepped(done.model, done.plan.then(plan), done.statistics, done.scores)


def _share(units: Units, ratio: float, step: int, recipe: Recipe) -> dict[str, Any]:
    """What a search is asked for in a step: the ratio, or what of the dense model may be left."""
    if recipe.steps == 1:
        return {"ratio": ratio}
    resource = named_resource(recipe.search.get("resource", "parameters"))
    whole = resource.whole(units, recipe.search.get("ratio_of", "model"))
    return {"budget": whole * (1 - ratio * step / recipe.steps)}


def _reached(model: PreTrainedModel, share: dict[str, Any], recipe: Recipe) -> bool:
    """Whether the model already takes no more than a step may leave."""
    resource = named_resource(recipe.search.get("resource", "parameters"))
    left = resource.whole(discover(model), recipe.search.get("ratio_of", "model"))
    return left <= share["budget"] * (1 + 1e-12)
