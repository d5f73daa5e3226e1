"""Perplexity after pruning by criterion, search, compensation and steps, over calibration seeds (method.md's protocol).

``python -m benchmarks.criteria [--model small_model|small_qwen2] [--text selection|report] [--seeds 0,1,2,3,4]
[--groups criteria,choices,pipelines,z_scores] [--cells FILE]``. Defaults are chosen on the selection text and reported
once on the report text. Each row is the geometric mean over seeds, ours / dense. ``--cells`` writes every cell as it is
measured; those already in the file are not measured again, so start another file where the method has changed.
``--groups grid --samples 32`` is the product of criteria, searches, compensation and steps: 72 cases.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import SMALL_MODEL, Row
from benchmarks.evidence_cases import CASES, GROUPS, Case
from benchmarks.results import write_whole
from benchmarks.tasks import Task, run_tasks
from saap.calibrate import calibrate
from saap.data import encode, load_documents
from saap.evaluate import perplexity
from saap.steps import Recipe, prune_in_steps

RATIOS = (0.2, 0.35, 0.5)  # of the decoder layers' parameters
CALIBRATION = {"samples": 128, "seq_len": 256}
TOKENS = 20_480  # of the text that perplexity is measured on: 40 windows
SAME_DENSE = 1e-4  # relative: rounding differs between machines by 1e-6, texts of other lengths by more than 1e-3


@dataclass(frozen=True)
class Cell:
    """One pruned model."""

    model: str
    text: str
    case: str
    group: str
    ratio: float
    seed: int
    perplexity: float
    dense: float

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What makes it this cell and no other."""
        return self.model, self.text, self.case, self.ratio, self.seed


def read_cells(path: Path) -> list[Cell]:
    """What ``--cells`` wrote; ValueError for other files."""
    try:
        return [Cell(**row) for row in json.loads(path.read_text())]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a list of cells as benchmarks.criteria writes them: {error}") from error


def load_model(name: str = SMALL_MODEL.name) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A shipped model and the tokenizer that both share."""
    return AutoModelForCausalLM.from_pretrained(SMALL_MODEL.parent / name), AutoTokenizer.from_pretrained(SMALL_MODEL)


def held_out(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> Tensor:
    """The first ``tokens`` token ids of the selection or report text."""
    return torch.cat([encode(tokenizer, d) for d in load_documents(SMALL_MODEL / f"{text}.jsonl")])[:tokens]


def measure_cells(
    name: str, text: str, seeds: Iterable[int], cases: Sequence[Case], ratios: Sequence[float] = RATIOS,
    calibration: dict[str, Any] = CALIBRATION, tokens: int = TOKENS, kept: Iterable[Cell] = (),
) -> Iterator[Cell]:  # fmt: skip
    """Prune and measure, seed by seed; one calibration per seed serves every one-step case.

    Cells that are ``kept`` are left out. Raises ValueError, before anything is pruned, where one was measured on
    other tokens of this text.
    """
    known = {cell.key: cell for cell in kept}
    left = {
        seed: [(case, ratio) for case in cases for ratio in ratios if (name, text, case.name, ratio, seed) not in known]
        for seed in seeds
    }
    if not any(left.values()):
        return
    model, tokenizer = load_model(name)
    ids, data = held_out(tokenizer, text, tokens), SMALL_MODEL / "calibration.jsonl"
    dense = perplexity(model, tokenizer, [ids])
    _check_kept([cell for cell in known.values() if (cell.model, cell.text) == (name, text)], dense)
    for seed, pairs in left.items():
        if not pairs:
            continue
        settings = {**calibration, "seed": seed}
        statistics = calibrate(model, tokenizer, data, **settings, coupled=True)
        for case, ratio in pairs:
            recipe = Recipe(
                case.criterion,
                {"ratio_of": "blocks", **case.search},
                settings,
                case.compensate,
                case.steps,
                case.inputs,
                case.step_samples,
                case.compensated_scores,
            )
            pruned = prune_in_steps(model, tokenizer, data, ratio, recipe, statistics=statistics, copy=True).model
            found = perplexity(pruned, tokenizer, [ids])
            yield Cell(name, text, case.name, case.group, ratio, seed, found, dense)


def _check_kept(kept: Iterable[Cell], dense: float) -> None:
    for cell in kept:
        if abs(cell.dense / dense - 1) > SAME_DENSE:
            raise ValueError(
                f"expected cells of the same --tokens: those kept of {cell.model} on the {cell.text} text have a dense "
                f"perplexity of {cell.dense:.4f}, here it is {dense:.4f}"
            )


def rows_of(cells: list[Cell]) -> list[Row]:
    """One row per case and ratio: the geometric mean of the perplexity over seeds, against the dense model's."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(f"{cell.model}, {cell.text}, {cell.ratio:.0%} of blocks: {cell.case}", []).append(cell)
    return [
        Row.compare(case, math.exp(mean(math.log(c.perplexity) for c in found)), found[0].dense, "ppl")
        for case, found in grouped.items()
    ]


def tasks(args: argparse.Namespace) -> list[Task]:
    cases = [case for case in CASES if case.group in args.groups and args.match in case.name]
    if not cases:
        raise SystemExit(f"error: no case of {', '.join(args.groups)} has {args.match!r} in its name")

    def measure() -> list[Row]:
        if args.quick:
            few = {"samples": 8, "seq_len": 128}
            chosen = [case for case in cases if case.steps <= 4][::6]
            return rows_of(list(measure_cells(args.model, args.text, [0], chosen, [0.2], few, 1024)))
        return rows_of(measure_and_write(args, cases))

    return [Task(f"criteria {args.model} {args.text}", measure)]


def measure_and_write(args: argparse.Namespace, cases: Sequence[Case]) -> list[Cell]:
    """The cells of ``cases`` and the other arguments: those in ``args.cells``, and the rest, which is added to it."""
    cells = read_cells(args.cells) if args.cells and args.cells.exists() else []
    calibration = CALIBRATION | {"samples": args.samples}
    found = measure_cells(args.model, args.text, args.seeds, cases, args.ratios, calibration, args.tokens, list(cells))
    for cell in found:
        cells.append(cell)
        print(f"{cell.case}, {cell.ratio:.0%}, seed {cell.seed}: {cell.perplexity / cell.dense:.4f}", flush=True)
        if args.cells:
            write_whole(args.cells, json.dumps([vars(c) for c in cells], indent=0) + "\n")
    keys = {(args.model, args.text, c.name, r, s) for c in cases for r in args.ratios for s in args.seeds}
    return [cell for cell in cells if cell.key in keys]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number; got {text!r}")
    return int(text)


def seed_list(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 0,1,2; got {text!r}")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def ratio_list(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(dict.fromkeys(map(float, text.split(","))))
    except ValueError:
        ratios = ()
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise argparse.ArgumentTypeError(f"expected shares between 0 and 1 such as 0.2,0.5; got {text!r}")
    return ratios


def _groups(text: str) -> tuple[str, ...]:
    if not set(text.split(",")) <= set(GROUPS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(GROUPS)}; got {text!r}")
    return tuple(text.split(","))


def options(parser: argparse.ArgumentParser) -> None:
    tables = ("criteria", "choices", "pipelines", "z_scores")
    parser.add_argument("--model", default=SMALL_MODEL.name, choices=(SMALL_MODEL.name, "small_qwen2"))
    parser.add_argument("--text", default="selection", choices=("selection", "report"))
    parser.add_argument("--seeds", type=seed_list, default=(0,), help="calibration seeds, such as 0,1,2 (default 0)")
    parser.add_argument("--ratios", type=ratio_list, default=RATIOS, help="of the blocks (default 0.2,0.35,0.5)")
    parser.add_argument("--samples", type=positive, default=CALIBRATION["samples"], help="calibration sequences "
                        "of 256 tokens (default 128), which cells do not record")  # fmt: skip
    parser.add_argument("--groups", type=_groups, default=tables, help=f"tables to measure, of {', '.join(GROUPS)} "
                        "(default: all but grid)")  # fmt: skip
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--tokens", type=positive, default=TOKENS, help="of the text")
    parser.add_argument("--cells", type=Path, help="keep the cells in this file, and add those that it lacks")


if __name__ == "__main__":
    run_tasks(__doc__ or "", tasks, options)
