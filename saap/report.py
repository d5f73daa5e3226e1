"""The report: what happened to a model, as plain data and as one self-contained HTML file."""

import os
import platform
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from transformers import PreTrainedModel

from saap.evaluate import Evaluation
from saap.plan import Plan, write_atomically
from saap.prune import PruneResult
from saap.report_data import Fact, Report, Widths
from saap.report_page import render
from saap.report_scores import module_scores
from saap.scores import Scores
from saap.statistics import Statistics
from saap.units import LayerUnits
from saap.version import __version__

REPORT_FILE = "saap_report.html"
DRAWING_ERRORS = (
    ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, TemplateError,
)  # fmt: skip


def report(
    result: PruneResult,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    baselines: Iterable[tuple[str, Evaluation]] = (),
) -> None:
    """Write what ``prune`` did to a model as one HTML file that needs no network and no script.

    ``name`` is shown instead of the one the model was loaded by; ``baselines`` are further rows of the table of
    evaluations. The file is written atomically and replaced if it exists. It stays below half a megabyte
    whatever the model's size: at most 64 bins a layer and 1500 units a module are drawn.
    """
    described = describe_pruning(
        name or shown_name(result.model.name_or_path), result.plan, result.model,
        statistics=result.statistics, scores=result.scores, evaluation=result.evaluation,
        baselines=baselines, timings=result.timings,
    )  # fmt: skip
    write_atomically(Path(path), render(described))


def report_into(folder: Path, *args: Any, **kwargs: Any) -> str | None:
    """Write the report of ``describe_pruning``'s arguments into a checkpoint that is being saved.

    Errors as ``drawn_into``.
    """
    return drawn_into(folder, lambda: describe_pruning(*args, **kwargs))


def drawn_into(folder: Path, described: Callable[[], Report]) -> str | None:
    """Write a report into a checkpoint that is being saved.

    Whatever goes wrong, a drawing must not cost a model: the error is returned as text, and no file is left.
    """
    target = folder / REPORT_FILE
    try:
        target.write_text(render(described()), encoding="utf-8")
    except DRAWING_ERRORS as error:
        target.unlink(missing_ok=True)
        return f"{type(error).__name__}: {error}"
    return None


def describe_pruning(
    name: str,
    plan: Plan,
    pruned: PreTrainedModel,
    *,
    statistics: Statistics | None = None,
    scores: Scores | None = None,
    evaluation: Evaluation | None = None,
    baselines: Iterable[tuple[str, Evaluation]] = (),
    timings: dict[str, float] | None = None,
    files: dict[str, str] | None = None,
) -> Report:
    """Gather the report of one pruned model; of the values of ``files`` only the last part of a path is shown."""
    before, after = plan.units.layers, plan.layers
    criterion = str(plan.settings.get("criterion", ""))
    rows = [] if evaluation is None else [("pruned", evaluation), *baselines]
    if evaluation is not None and evaluation.against is not None:
        rows.insert(0, ("dense", evaluation.against))
    settings = {"Plan": plan.settings}
    if statistics is not None:
        measured = {"sequences": statistics.sequences, "tokens": statistics.tokens}
        settings["Calibration"] = statistics.settings | measured | {"data fingerprint": statistics.data_fingerprint()}
    if files:
        settings["Text and files"] = {key: shown_name(file) for key, file in files.items()}
    return Report(
        title=f"{name}, pruned",
        summary=_summary(plan),
        names=("dense", "pruned"),
        facts=_facts(plan, pruned, evaluation),
        widths=[
            Widths("KV heads", [old.kv_heads for old in before], [len(new.kv_heads) for new in after]),
            *mlp_widths(before, [(new.width, len(new.experts)) for new in after]),
        ],
        scores=[] if scores is None else module_scores(plan, scores),
        criterion=criterion,
        evaluations=[(row, {**found.to_dict(), "against": None}) for row, found in rows],
        settings=settings,
        timings=dict(timings or {}),
        environment=environment(pruned.device) | {"dtype": str(pruned.dtype).removeprefix("torch.")},
        made=now(),
    )  # fmt: skip


def mlp_widths(before: Iterable[LayerUnits], after: Iterable[tuple[int, int]]) -> list[Widths]:
    """Widths of MLPs, or of each expert, and then how many experts; after: (width, experts) of every layer."""
    old, new = [(layer.intermediate_size, layer.experts) for layer in before], list(after)
    mixture = any(experts for _, experts in old + new)
    names = ("channels of each expert", "experts") if mixture else ("MLP channels",)
    return [Widths(name, [each[i] for each in old], [each[i] for each in new]) for i, name in enumerate(names)]


def shown_name(name: str) -> str:
    """A hub name whole and a local path's last part, because reports travel with checkpoints."""
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists():
        return name
    return Path(name).name or "unnamed model"


def environment(device: torch.device) -> dict[str, str]:
    """Versions, and the device that computed."""
    cuda = device.type == "cuda"
    return {
        "saap": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} ({platform.machine()})",
        "threads": str(torch.get_num_threads()),
    }


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _summary(plan: Plan) -> str:
    asked = ""
    ratio = plan.settings.get("ratio")
    if isinstance(ratio, (int, float)):
        whole = "the model's" if plan.settings.get("ratio_of") == "model" else "the decoder layers'"
        asked = f"Asked: {ratio:.2%} of {whole} {plan.settings.get('resource', 'parameters')}. "
    reached = f"Removed: {plan.ratio:.2%} of all parameters, {plan.block_ratio:.2%} of the decoder layers'."
    target = plan.settings.get("target")
    reached += "" if target is None else f" Made for {target}."
    return f"{asked}{reached} Family {plan.units.family}, {len(plan.layers)} layers."


def _facts(plan: Plan, pruned: PreTrainedModel, evaluation: Evaluation | None) -> list[Fact]:
    """Sizes, measured where there is an evaluation and counted from the plan otherwise; then what was measured."""
    if evaluation is None or evaluation.against is None:
        sizes, dtype = plan.units.layers, pruned.dtype
        cache = [2 * layer.head_dim * dtype.itemsize for layer in sizes]  # bytes per KV head and token
        dense, kept = plan.units.total_parameters, pruned.num_parameters()
        caches = (
            sum(size * layer.kv_heads for size, layer in zip(cache, sizes, strict=True)),
            sum(size * len(layer.kv_heads) for size, layer in zip(cache, plan.layers, strict=True)),
        )
        return [
            Fact("Parameters", dense, kept, "count"),
            Fact("Weights", dense * dtype.itemsize, kept * dtype.itemsize, "bytes"),
            Fact("KV cache per token", *caches, "bytes"),
        ]
    return evaluation_facts(evaluation.against, evaluation)


def evaluation_facts(before: Evaluation, after: Evaluation) -> list[Fact]:
    """The headline figures of two evaluated models."""
    return [
        Fact("Perplexity", before.perplexity, after.perplexity, "perplexity"),
        Fact("Parameters", before.parameters, after.parameters, "count"),
        Fact("Weights", before.weight_bytes, after.weight_bytes, "bytes"),
        Fact("KV cache per token", before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token, "bytes"),
        Fact("Decoding speed", before.tokens_per_second, after.tokens_per_second, "tokens/s"),
    ]
