"""Perplexity after pruning by criterion, search, compensation and steps, over calibration seeds (method.md's protocol).

``python -m benchmarks.criteria [--model small_model|small_qwen2] [--text selection|report] [--seeds 0,1,2,3,4]
[--groups criteria,choices,pipelines] [--cells FILE]``. Defaults are chosen on the selection text and reported once
on the report text. Each row is the geometric mean over seeds, ours / dense; ``--cells`` writes every cell.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import SMALL_MODEL, Row
from benchmarks.evidence_cases import CASES, Case
from benchmarks.results import write_whole
from benchmarks.tasks import Task, run_tasks
from saap.calibrate import calibrate
from saap.data import encode, load_documents
from saap.evaluate import perplexity
from saap.steps import Recipe, prune_in_steps

RATIOS = (0.2, 0.35, 0.5)  # of the decoder layers' parameters
CALIBRATION = {"samples": 128, "seq_len": 256}
TOKENS = 20_480  # of the text that perplexity is measured on: 40 windows


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


def load_model(name: str = SMALL_MODEL.name) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A shipped model and the tokenizer that both share."""
    return AutoModelForCausalLM.from_pretrained(SMALL_MODEL.parent / name), AutoTokenizer.from_pretrained(SMALL_MODEL)


def held_out(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> Tensor:
    """The first ``tokens`` token ids of the selection or report text."""
    return torch.cat([encode(tokenizer, d) for d in load_documents(SMALL_MODEL / f"{text}.jsonl")])[:tokens]


def measure_cells(
    name: str, text: str, seeds: Iterable[int], cases: Iterable[Case], ratios: Iterable[float] = RATIOS,
    calibration: dict[str, Any] = CALIBRATION, tokens: int = TOKENS,
) -> Iterator[Cell]:  # fmt: skip
    """Prune and measure, seed by seed; one calibration per seed serves every one-step case."""
    model, tokenizer = load_model(name)
    ids, data = held_out(tokenizer, text, tokens), SMALL_MODEL / "calibration.jsonl"
    dense = perplexity(model, tokenizer, [ids])
    for seed in seeds:
        settings = {**calibration, "seed": seed}
        statistics = calibrate(model, tokenizer, data, **settings, coupled=True)
        for case in cases:
            for ratio in ratios:
                recipe = Recipe(
                    case.criterion,
                    {"ratio_of": "blocks", **case.search},
                    settings,
                    case.compensate,
                    case.steps,
                    case.inputs,
                    case.step_samples,
                )
                pruned = prune_in_steps(model, tokenizer, data, ratio, recipe, statistics=statistics, copy=True).model
                found = perplexity(pruned, tokenizer, [ids])
                yield Cell(name, text, case.name, case.group, ratio, seed, found, dense)


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
    cases = [case for case in CASES if case.group in args.groups.split(",") and args.match in case.name]
    seeds = [int(seed) for seed in args.seeds.split(",")]

    def measure() -> list[Row]:
        if args.quick:
            few = {"samples": 8, "seq_len": 128}
            chosen = [case for case in cases if case.steps <= 4][::6]
            return rows_of(list(measure_cells(args.model, args.text, [0], chosen, [0.2], few, 1024)))
        cells: list[Cell] = []
        for cell in measure_cells(args.model, args.text, seeds, cases, tokens=args.tokens):
            cells.append(cell)
            print(f"{cell.case}, {cell.ratio:.0%}, seed {cell.seed}: {cell.perplexity / cell.dense:.4f}", flush=True)
            if args.cells:
                write_whole(args.cells, json.dumps([vars(c) for c in cells], indent=0) + "\n")
        return rows_of(cells)

    return [Task(f"criteria {args.model} {args.text}", measure)]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=SMALL_MODEL.name, choices=(SMALL_MODEL.name, "small_qwen2"))
    parser.add_argument("--text", default="selection", choices=("selection", "report"))
    parser.add_argument("--seeds", default="0", help="calibration seeds, such as 0,1,2,3,4")
    parser.add_argument("--groups", default="criteria,choices,pipelines", help="tables to measure")
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the text")
    parser.add_argument("--cells", type=Path, help="write every cell to this file, as it is measured")


if __name__ == "__main__":
    run_tasks(__doc__ or "", tasks, options)
