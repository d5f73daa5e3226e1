"""One cell of the 7B protocol: calibrate, prune, save, load again, measure, and write what was found."""

import gc
import json
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import saap
from benchmarks.common import device_name
from benchmarks.protocol_models import Model, tokenizer_of
from benchmarks.protocol_texts import identity, token_ids
from benchmarks.zero_shot import lm_eval_version, rows_file, zero_shot
from saap.console import progress
from saap.criteria import CRITERIA, Criterion, needs_coupled
from saap.data import Document
from saap.evaluate import perplexity
from saap.opening import open_for_calibration, open_model
from saap.plan import write_atomically
from saap.stream import progress_unit
from saap.units import discover


@dataclass(frozen=True)
class Settings:
    """What all cells of one output folder share; a table never mixes cells of different settings."""

    calibration: str
    samples: int
    seq_len: int
    method: str
    dtype: str | None
    perplexity_data: dict[str, str]
    seq_lens: tuple[int, ...]
    tasks: tuple[str, ...]
    task_folder: str | None
    limit: int | None
    batch_size: int

    def recorded(self) -> dict[str, Any]:
        """As written to disk: with the content of local files, and the version of lm_eval that defines the tasks."""
        texts = {name: identity(source) for name, source in self.perplexity_data.items()}
        files = {} if self.task_folder is None else {t: str(rows_file(Path(self.task_folder), t)) for t in self.tasks}
        return asdict(self) | {
            "calibration": identity(self.calibration),
            "perplexity_data": texts,
            "seq_lens": list(self.seq_lens),
            "tasks": list(self.tasks),
            "task_folder": {task: identity(file) for task, file in files.items()} or None,
            "lm_eval": lm_eval_version(),
        }


@dataclass(frozen=True)
class Cell:
    """One model at one ratio by one criterion, calibrated with one seed; without them the dense model."""

    model: Model
    ratio: float | None = None
    criterion: str | None = None
    seed: int | None = None

    @property
    def label(self) -> str:
        if self.ratio is None:
            return f"{self.model.name} dense"
        return f"{self.model.name} {self.ratio:.0%} {self.criterion} seed {self.seed}"

    def stem(self, out: Path) -> Path:
        """What the paths of this cell's files start with."""
        folder = out / self.model.slug
        return (
            folder / "dense"
            if self.ratio is None
            else folder / f"seed-{self.seed}" / f"{self.criterion}-{self.ratio:g}"
        )

    def result(self, out: Path) -> Path:
        stem = self.stem(out)
        return stem.with_name(f"{stem.name}.result.json")

    def statistics(self, out: Path) -> Path:
        kind = "coupled-statistics" if needs_coupled(self.criterion or "") else "statistics"
        return self.stem(out).with_name(f"{kind}.safetensors")


@dataclass(frozen=True)
class Inputs:
    """What is read once for all cells: calibration documents, and perplexity texts by name."""

    calibration: list[Document]
    texts: dict[str, str]


def run_cell(cell: Cell, settings: Settings, inputs: Inputs, out: Path, keep: bool) -> dict[str, Any]:
    """Measure one cell, write its result and return it; what is measured is the checkpoint as it loads from disk.

    An interrupted cell leaves its statistics and checkpoint, which the next run uses. With ``keep`` the
    checkpoint stays; the plan stays in any case.
    """
    start = time.perf_counter()
    tokenizer = tokenizer_of(cell.model)
    source = cell.model.path
    if cell.ratio is not None:
        source = str(cell.stem(out))
        if not cell.stem(out).is_dir():
            _prune(cell, settings, inputs, tokenizer, out)
            free_memory()  # of the dense model
    model = open_model(source, settings.dtype)
    pruned = time.perf_counter()
    found = {
        "model": cell.model.name, "path": cell.model.path, "ratio": cell.ratio, "criterion": cell.criterion,
        "seed": cell.seed, "parameters": discover(model).total_parameters,
        "perplexity": _perplexities(model, tokenizer, inputs.texts, settings.seq_lens, cell.label),
        "tasks": zero_shot(
            model, tokenizer, settings.tasks, limit=settings.limit, batch_size=settings.batch_size,
            folder=None if settings.task_folder is None else Path(settings.task_folder),
        ),
        "seconds": {"pruning": pruned - start, "measuring": time.perf_counter() - pruned},
        "dtype": str(model.dtype).removeprefix("torch."), "device": device_name(), "date": str(date.today()),
        "versions": {name: version(name) for name in ("torch", "transformers", "lm_eval")} | {"saap": saap.__version__},
    }  # fmt: skip
    write_atomically(cell.result(out), json.dumps(found, indent=2) + "\n")
    if cell.ratio is not None and not keep:
        shutil.rmtree(cell.stem(out))
    return found


def _prune(cell: Cell, settings: Settings, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the cell's checkpoint and plan; statistics, and coupled ones, are measured once per model and seed."""
    assert cell.ratio is not None and cell.criterion is not None and cell.seed is not None
    dense, streaming = open_for_calibration(cell.model.path, settings.dtype, "auto", None)
    file = cell.statistics(out)
    if not file.is_file():
        with progress(f"calibrating {cell.model.name} seed {cell.seed}", progress_unit(streaming)) as bar:
            saap.calibrate(
                dense, tokenizer, inputs.calibration, samples=settings.samples,
                seq_len=settings.seq_len, seed=cell.seed, stream=streaming or False, progress=bar,
                coupled=needs_coupled(cell.criterion),
            ).save(file)  # fmt: skip
    result = saap.prune(
        dense, ratio=cell.ratio, criterion=_criterion(cell), method=settings.method,
        statistics=saap.Statistics.load(file),
    )  # fmt: skip
    stem = cell.stem(out)
    result.plan.save(stem.with_name(f"{stem.name}.plan.json"))
    saap.save(result.model, stem, tokenizer=tokenizer)


def _criterion(cell: Cell) -> str | Criterion:
    assert cell.criterion is not None
    if cell.criterion == "random":  # it reads no calibration text, so the seed must reach it otherwise
        return partial(CRITERIA["random"], seed=cell.seed)
    return cell.criterion


def _perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, str],
    seq_lens: tuple[int, ...],
    label: str,
) -> dict[str, dict[str, dict[str, float]]]:
    """{text: {length: perplexity, windows and predicted tokens}}: the text as one stream, whole windows only."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, text in texts.items():
        ids = token_ids(tokenizer, text)
        for length in seq_lens:
            windows = len(ids) // length
            with progress(f"{label}: {name} at {length}", "windows") as bar:
                value = perplexity(model, None, [ids[: windows * length]], seq_len=length, progress=bar)
            numbers = {"perplexity": value, "windows": windows, "tokens": windows * (length - 1)}
            found.setdefault(name, {})[str(length)] = numbers
    return found


def free_memory() -> None:
    """Give a dropped model's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
