"""What ``saap prune`` does: one calibration, then one pruned model per ratio."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from saap import console
from saap.calibrate import calibrate
from saap.card import Made
from saap.checkpoint import refuse_existing, save
from saap.compact import PLAN_ATTRIBUTE, compact
from saap.compensate import check_compensate, compensation, refuse_experts
from saap.criteria import check_criterion, check_statistics, needs_coupled
from saap.data import check_tokenizer, load_documents
from saap.evaluate import Evaluation, evaluate
from saap.evaluate_baselines import evaluate_baselines
from saap.micro_batches import Progress
from saap.plan import Plan
from saap.report import REPORT_FILE, report_into, shown_name
from saap.resources import named_resource
from saap.results import Result
from saap.scores import Scores
from saap.search import check_ratio
from saap.serving.targets import check_config
from saap.stages import Stages
from saap.statistics import Statistics
from saap.steps import COMPENSATION_OPTIONS, Recipe, prune_in_steps
from saap.stopwatch import Stopwatch
from saap.stream import progress_unit
from saap.units import Units, discover
from saap.warm_statistics import Sequences


def parse_ratios(text: str | None, plan: Path | None) -> tuple[float, ...]:
    """ "0.1,0.2" -> (0.1, 0.2); empty when a plan is given instead."""
    if (text is None) == (plan is None):
        raise ValueError("give exactly one of --ratio and --plan")
    if text is None:
        return ()
    try:
        ratios = tuple(float(piece) for piece in text.split(","))
    except ValueError as error:
        raise ValueError(f"--ratio: expected numbers such as 0.2 or 0.1,0.2,0.3; got {text!r}") from error
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must lie strictly between 0 and 1; got {ratio}")
    if len(set(ratios)) != len(ratios):
        raise ValueError(f"--ratio: expected different ratios in a sweep; got {text!r}")
    return ratios


def refuse_existing_file(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already; use --force to replace it")


@dataclass(frozen=True)
class Job:
    """Everything ``saap prune`` was asked for."""

    out: Path
    ratios: tuple[float, ...]
    data: str | None
    plan_file: Path | None
    statistics_file: Path | None
    save_statistics: Path | None
    eval_text: str | None
    criterion: str
    search_options: dict[str, Any]
    calibration: dict[str, Any]
    layout: str
    force: bool
    report: bool = True
    baselines: tuple[str, ...] = ()
    compensate: str = "none"
    steps: int = 1
    compensation_inputs: str = "auto"
    step_samples: int | None = None
    compensated_scores: bool | str = "auto"
    command: str = ""
    recover_tokens: int | None = None

    def targets(self) -> dict[float | None, Path]:
        """{ratio: directory}; a plan has the ratio None."""
        if len(self.ratios) <= 1:
            return {(self.ratios[0] if self.ratios else None): self.out}
        return {ratio: self.out / f"ratio-{ratio:.4f}".rstrip("0") for ratio in self.ratios}

    def check_files(self) -> None:
        """Everything that can be refused without loading the model."""
        method = self.search_options.get("method", "global")
        for criterion in self.criteria:
            check_criterion(criterion, method)
            recipe = replace(self.recipe(), criterion=criterion)
            recipe.check_coupled(given=self.statistics_file is not None or self.plan_file is not None)
        check_compensate(self.compensate, self.data, self.compensation_inputs)
        if self.plan_file is not None and (self.statistics_file or self.save_statistics):
            raise ValueError("a --plan needs no statistics: give it without --statistics and --save-statistics")
        if self.statistics_file is not None and self.save_statistics is not None:
            raise ValueError("--save-statistics keeps what is measured; with --statistics nothing is")
        if self.steps > 1 and (self.data is None or self.plan_file is not None):
            raise ValueError(
                "--steps calibrates anew after every step: it needs --data, and a --ratio instead of a --plan"
            )
        if self.recover_tokens is not None and (self.data is None or self.plan_file is not None):
            raise ValueError(
                "--recover-tokens tunes after every step: it needs --data, and a --ratio instead of a --plan, whose "
                "model saap recover tunes"
            )
        if self.baselines and (self.eval_text is None or self.plan_file is not None):
            raise ValueError("--baselines needs --eval, and a --ratio to prune them by instead of a --plan")
        if len(set(self.targets().values())) < len(self.targets()):
            raise ValueError(f"ratios of a sweep must differ in four decimals; got {', '.join(map(str, self.ratios))}")
        for target in self.targets().values():
            refuse_existing(target, self.force)
        if self.save_statistics is not None:
            refuse_existing_file(self.save_statistics, self.force)
        if self.plan_file is not None:
            self._plan(self.plan_file)
        if self.statistics_file is not None:
            check_statistics(Statistics.load(self.statistics_file), *self.criteria)
        measured = self.plan_file is not None or self.statistics_file is not None
        if self.compensate != "none" or self.steps > 1 or self.recover_tokens is not None or not measured:
            load_documents(self.data)
        if self.eval_text is not None:
            load_documents(self.eval_text)

    @property
    def criteria(self) -> tuple[str, ...]:
        """All that the statistics must serve."""
        return (self.criterion, *self.baselines)

    @property
    def coupled(self) -> bool:
        """Whether the dense model's statistics are measured here, coupled ones among them."""
        return self.statistics_file is None and self.plan_file is None and needs_coupled(*self.criteria)

    def _plan(self, file: Path) -> Plan:
        """The plan of a file; raises ValueError unless a target that is asked for takes what it leaves."""
        plan, target = Plan.load(file), self.search_options.get("target")
        return plan if target is None else replace(plan, settings=plan.settings | {"target": target})

    def check_target(self, config: PreTrainedConfig) -> None:
        """Raise ValueError for what the target, the plan's own unless one is asked for, does not take of a model."""
        given = {} if self.plan_file is None else self._plan(self.plan_file).settings
        check_config(given.get("target", self.search_options.get("target")), config, self.compensate)

    def recipe(self) -> Recipe:
        """How each ratio is pruned; raises ValueError for a number of steps that is none."""
        return Recipe(
            self.criterion, self.search_options, self.calibration, self.compensate, self.steps,
            self.compensation_inputs, self.step_samples, self.compensated_scores, self.recover_tokens,
        )  # fmt: skip

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[Result]:
        """Do the work; every output appears complete or not at all."""
        units = discover(model)
        refuse_experts(units, self.compensate, self.compensation_inputs)
        for ratio in self.ratios:
            check_ratio(units, ratio, **self.search_options)
        self.check_target(model.config)
        named_resource(self.search_options.get("resource", "parameters")).warn_of_dtype(model.dtype)
        if tokenizer is not None:
            check_tokenizer(model, tokenizer)
        if self.step_samples is not None:  # enough text for all steps, or an error now
            Sequences.of(model, tokenizer, self.data, self.calibration, self.steps, self.step_samples)
        self.recipe().tuning(model, units, tokenizer, self.data)
        name, watch = shown_name(model.name_or_path), Stopwatch()
        statistics = None if self.statistics_file is None else Statistics.load(self.statistics_file)
        if statistics is not None:
            statistics.check_model(units)
        elif len(self.ratios) > 1:
            with console.progress("calibrating", progress_unit(self.calibration.get("stream"))) as bar:
                statistics = self._measure(model, tokenizer, watch, bar)
        results, scores = [], None
        dense: PreTrainedModel | Evaluation | None = model if self.eval_text is not None else None
        for key, target in self.targets().items():
            last = key == list(self.targets())[-1] and dense is None
            mine = Stopwatch(watch.seconds)  # what the ratios share, then this one's stages
            pruned, scores, statistics = self._prune(model, tokenizer, key, statistics, scores, mine, copy=not last)
            result = Result(target, getattr(pruned, PLAN_ATTRIBUTE), pruned.num_parameters(), None)
            if self.eval_text is not None:
                with console.progress(f"evaluating {target.name}", "windows") as bar, mine("evaluate"):
                    evaluation = evaluate(pruned, tokenizer, self.eval_text, against=dense, progress=bar)
                dense = evaluation.against
                result = replace(result, evaluation=evaluation)
            if key is not None and statistics is not None and self.baselines:
                with console.progress("evaluating baselines", "windows") as bar, mine("baselines"):
                    baselines = evaluate_baselines(
                        self.baselines, model, tokenizer, self.eval_text, self.data, statistics, key, self.recipe(), bar
                    )
                result = replace(result, baselines=baselines)
            also = partial(self._report, name, result, pruned, statistics, scores, mine) if self.report else None
            made = Made(
                model.name_or_path, self.data, _amount(statistics), self.command, result.evaluation, self.eval_text
            )
            with mine("save"):
                save(pruned, target, tokenizer=tokenizer, layout=self.layout, force=self.force, also=also, made=made)
            report = target / REPORT_FILE
            results.append(replace(result, report=report if report.exists() else None))
        return results

    def _report(
        self, name: str, result: Result, pruned: PreTrainedModel, statistics: Statistics | None,
        scores: Scores | None, watch: Stopwatch, folder: Path,
    ) -> None:  # fmt: skip
        """Add the report to a checkpoint that is being saved."""
        files = {"calibration": self.data, "statistics": self.statistics_file, "plan": self.plan_file}
        failure = report_into(
            folder, name, result.plan, pruned, statistics=statistics, scores=scores,
            evaluation=result.evaluation, baselines=result.baselines, timings=watch.so_far(),
            files={key: str(file) for key, file in (files | {"evaluation": self.eval_text}).items() if file},
        )  # fmt: skip
        if failure is not None:
            console.screen.print(f"the model is saved without its report: {failure}", markup=False, soft_wrap=True)

    @contextmanager
    def _bar(self, key: float | None, units: Units, given: bool) -> Iterator[Stages]:
        """One bar for all stages of one ratio, or of the plan file (None)."""
        recipe, name = self.recipe(), f"{self.targets()[key].name}, " if len(self.ratios) > 1 else ""
        kinds = tuple(
            kind for kind in recipe.kinds(units) if key is not None or kind != "score"
        )  # a plan is not scored
        stages = Stages(recipe.steps, kinds, given or key is None)
        unit = (
            "sequences x blocks"
            if (1, "compensate") in stages.stages
            else progress_unit(self.calibration.get("stream"))
        )
        with console.progress(f"{name}pruning", unit if len(stages.stages) <= 1 else None) as bar:
            stages.progress, stages.title = bar, lambda title: bar.say(name + title)
            yield stages

    def _measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, watch: Stopwatch,
        progress: Progress | None,
    ) -> Statistics:  # fmt: skip
        """Statistics of the dense model, which all ratios share."""
        options = self.calibration | {"coupled": self.coupled}
        with watch("calibrate"):
            statistics = calibrate(model, tokenizer, self.data, **options, progress=progress)
        if self.save_statistics is not None:
            statistics.save(self.save_statistics)
        return statistics

    def _prune(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, ratio: float | None,
        statistics: Statistics | None, scores: Scores | None, watch: Stopwatch, *, copy: bool,
    ) -> tuple[PreTrainedModel, Scores | None, Statistics | None]:  # fmt: skip
        """The model pruned by one ratio, or by the plan file (None), and the scores and statistics of all ratios."""
        with self._bar(ratio, discover(model), given=statistics is not None) as stages:
            if ratio is None:
                return self._apply(model, tokenizer, watch, stages, copy=copy), None, None
            if statistics is None:
                statistics = self._measure(model, tokenizer, watch, stages.of(1, "calibrate"))
            done = prune_in_steps(
                model, tokenizer, self.data, ratio, self.recipe(),
                statistics=statistics, scores=scores, copy=copy, watch=watch, progress=stages,
            )  # fmt: skip
            return done.model, done.scores, statistics

    def _apply(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, watch: Stopwatch, stages: Stages,
        *, copy: bool,
    ) -> PreTrainedModel:  # fmt: skip
        """The model pruned by the plan file."""
        assert self.plan_file is not None  # a job has ratios or a plan
        plan, found = self._plan(self.plan_file), None
        plan.check_model(discover(model))
        if self.compensate != "none":
            options = {name: self.calibration[name] for name in COMPENSATION_OPTIONS}
            options |= {"method": self.compensate, "inputs": self.compensation_inputs}
            with watch("compensate"):
                counted = stages.of(1, "compensate")
                found = compensation(model, plan, tokenizer, self.data, **options, progress=counted)
        stages.say(1, "prune")
        with watch("compact"):
            return compact(model, plan, found, copy=copy)


def _amount(statistics: Statistics | None) -> str:
    """How much text statistics are of."""
    return "" if statistics is None else f"{statistics.sequences:,} sequences, {statistics.tokens:,} tokens"
