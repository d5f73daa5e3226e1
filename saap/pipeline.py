"""What ``saap prune`` does: one calibration, then one pruned model per ratio."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap import console
from saap.calibrate import calibrate
from saap.checkpoint import refuse_existing, save
from saap.compact import compact
from saap.compensate import Compensation, check_compensate, compensation
from saap.criteria import CRITERIA, score
from saap.data import check_tokenizer, load_documents
from saap.evaluate import Evaluation, evaluate
from saap.memory import available_bytes, weight_bytes
from saap.micro_batches import fit_micro_batches
from saap.plan import Plan
from saap.search import check_ratio, search
from saap.statistics import Statistics
from saap.stream import Streaming, progress_unit, streamed_bytes
from saap.units import discover


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


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan's sizes as plain values."""
    return {
        "removed_share": plan.ratio,
        "removed_share_of_blocks": plan.block_ratio,
        "parameters": plan.units.total_parameters - plan.removed_parameters,
        "kv_heads": [len(layer.kv_heads) for layer in plan.layers],
        "channels": [len(layer.channels) for layer in plan.layers],
    }


@dataclass(frozen=True)
class Result:
    """One pruned model on disk."""

    out: Path
    plan: Plan
    evaluation: Evaluation | None


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
    compensate: str = "none"

    def targets(self) -> dict[float | None, Path]:
        """{ratio: directory}; a plan has the ratio None."""
        if len(self.ratios) <= 1:
            return {(self.ratios[0] if self.ratios else None): self.out}
        return {ratio: self.out / f"ratio-{ratio:.4f}".rstrip("0") for ratio in self.ratios}

    def check_files(self) -> None:
        """Everything that can be refused without loading the model."""
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}; known: {', '.join(CRITERIA)}")
        check_compensate(self.compensate, self.data)
        for target in self.targets().values():
            refuse_existing(target, self.force)
        if self.save_statistics is not None:
            refuse_existing_file(self.save_statistics, self.force)
        if self.plan_file is not None:
            Plan.load(self.plan_file)
        if self.compensate != "none" or (self.plan_file is None and self.statistics_file is None):
            load_documents(self.data)
        if self.eval_text is not None:
            load_documents(self.eval_text)

    def preview(self, model: PreTrainedModel) -> dict[str, Any]:
        """Sizes and memory, for --dry-run."""
        units = discover(model)
        for ratio in self.ratios:
            check_ratio(units, ratio, **self.search_options)
        options, stream = self.calibration, self.calibration.get("stream")
        device, dtype, streamed = model.device, model.dtype, None
        if isinstance(stream, Streaming):
            device, dtype = stream.resolved_device(model), stream.dtype or dtype
            streamed = streamed_bytes(model, dtype)
        fit = fit_micro_batches(
            units, options["samples"], options["seq_len"], dtype, device,
            batch_size=options["batch_size"], checkpoint=options["checkpoint"], streamed_bytes=streamed,
        )  # fmt: skip
        return {
            "family": units.family,
            "layers": len(units.layers),
            "parameters": units.total_parameters,
            "block_parameters": units.block_parameters,
            "kv_heads": units.count("attention"),
            "channels": units.count("mlp"),
            "weight_bytes": weight_bytes(model),
            "batch_size": fit.batch,
            "checkpointing": fit.recompute,
            "activation_bytes": fit.activation_bytes,
            "available_bytes": available_bytes(device),
            "would_remove": {f"{r:g}": self._share(units, r) for r in self.ratios},
            "outputs": [str(path) for path in self.targets().values()],
        }

    def _share(self, units: Any, ratio: float) -> int:
        whole = units.total_parameters if self.search_options["ratio_of"] == "model" else units.block_parameters
        return int(ratio * whole)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[Result]:
        """Do the work; every output appears complete or not at all."""
        units = discover(model)
        for ratio in self.ratios:
            check_ratio(units, ratio, **self.search_options)
        if tokenizer is not None:
            check_tokenizer(model, tokenizer)
        plans = self._plans(model, tokenizer)
        results = []
        dense: PreTrainedModel | Evaluation | None = model if self.eval_text is not None else None
        for key, target in self.targets().items():
            last = key == list(self.targets())[-1] and dense is None
            pruned = compact(model, plans[key], self._compensation(model, tokenizer, plans[key]), copy=not last)
            evaluation = None
            if self.eval_text is not None:
                with console.progress(f"evaluating {target.name}", "windows") as bar:
                    evaluation = evaluate(pruned, tokenizer, self.eval_text, against=dense, progress=bar)
                dense = evaluation.against
            save(pruned, target, tokenizer=tokenizer, layout=self.layout, force=self.force)
            results.append(Result(target, plans[key], evaluation))
        return results

    def _plans(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[float | None, Plan]:
        units = discover(model)
        if self.plan_file is not None:
            plan = Plan.load(self.plan_file)
            plan.check_model(units)
            return {None: plan}
        if self.statistics_file is not None:
            statistics = Statistics.load(self.statistics_file)
        else:
            with console.progress("calibrating", progress_unit(self.calibration.get("stream"))) as bar:
                statistics = calibrate(model, tokenizer, self.data, **self.calibration, progress=bar)
            if self.save_statistics is not None:
                statistics.save(self.save_statistics)
        statistics.check_model(units)
        scores = score(statistics, self.criterion)
        return {ratio: search(scores, ratio, **self.search_options) for ratio in self.ratios}

    def _compensation(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, plan: Plan
    ) -> Compensation | None:
        if self.compensate == "none":
            return None
        options = {name: self.calibration[name] for name in ("samples", "seq_len", "batch_size", "seed", "stream")}
        with console.progress("compensating", "sequences x blocks") as bar:
            return compensation(model, plan, tokenizer, self.data, method=self.compensate, **options, progress=bar)


def report(results: list[Result], as_json: bool) -> None:
    """Print what was made, as a table or as JSON."""
    if as_json:
        outputs = [
            {"out": str(r.out), **describe_plan(r.plan), "evaluation": r.evaluation and r.evaluation.to_dict()}
            for r in results
        ]
        console.print_json({"outputs": outputs})
        return
    evaluated = [r for r in results if r.evaluation is not None]
    if evaluated:
        first = next(r.evaluation for r in evaluated if r.evaluation is not None)
        rows = [] if first.against is None else [console.evaluation_row("dense", first.against)]
        rows += [console.evaluation_row(r.out.name, r.evaluation) for r in evaluated if r.evaluation is not None]
        console.print_table(f"windows of {first.seq_len} tokens", console.EVALUATION_HEADER, rows)
    for r in results:
        kept = r.plan.units.total_parameters - r.plan.removed_parameters
        print(f"{r.out}: {kept:,} parameters, {r.plan.ratio:.2%} removed ({r.plan.block_ratio:.2%} of the blocks)")


def report_dry_run(preview: dict[str, Any], as_json: bool) -> None:
    """Print a preview without having done anything."""
    if as_json:
        console.print_json(preview)
        return
    for name, value in preview.items():
        shown = (
            f"{value / 2**20:,.1f} MiB" if name.endswith("bytes") else f"{value:,}" if isinstance(value, int) else value
        )
        print(f"{name.replace('_', ' ')}: {shown}")
    print(f"nothing was done; {torch.get_num_threads()} threads would work")
