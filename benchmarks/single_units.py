"""Rank correlation of each criterion with the truth: the loss increase of removing single units, one at a time.

``python -m benchmarks.single_units [--model small_model|small_qwen2] [--channels 300] [--found FILE]``: every KV
group and a sample of channels is masked by itself and the loss measured on the selection text. Rows are Spearman's
rho, per module and over both modules per parameter (what a global search ranks by), with the 95 % percentile
interval of 1000 bootstrap samples of the units; calibration seed 0.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import SMALL_MODEL, Row
from benchmarks.criteria import CALIBRATION, held_out, load_model
from benchmarks.evidence_cases import CASES
from benchmarks.results import write_whole
from benchmarks.tasks import Task, run_tasks
from saap.calibrate import calibrate
from saap.scores import Scores
from saap.units import MODULES, Units, unit_masks

TOKENS = 8192


@torch.no_grad()
def loss_increases(
    model: PreTrainedModel, units: Units, ids: Tensor, chosen: dict[str, list[int]], progress: Callable[[str], None]
) -> dict[str, Tensor]:
    """{module: (n,)} rise of the mean loss over ids (N, T) when each chosen unit (flat index) is masked alone."""
    found = {}
    with unit_masks(model, units) as masks:

        def loss() -> float:
            return float(
                sum(model(input_ids=rows, labels=rows).loss.double() * len(rows) for rows in ids.split(8))
            ) / len(ids)

        dense = loss()
        for module, indices in chosen.items():
            offsets, rises = units.offsets(module), []
            for index in indices:
                layer = next(i for i in range(len(units.layers)) if index < offsets[i + 1])
                masks[module][layer][index - offsets[layer]] = 0
                rises.append(loss() - dense)
                masks[module][layer][index - offsets[layer]] = 1
            found[module] = torch.tensor(rises, dtype=torch.float64)
            progress(f"{len(indices)} {module} units masked one at a time")
    return found


def spearman(left: Tensor, right: Tensor) -> float:
    """Spearman's rank correlation of two (n,) tensors, ties sharing their mean rank; 0 where one is constant."""
    ranks = torch.stack([_ranks(values) for values in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num(0.0))


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def interval(left: Tensor, right: Tensor, samples: int = 1000) -> tuple[float, float]:
    """95 % interval of ``spearman``: percentiles over bootstrap samples of the pairs (Efron 1979)."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(left), (samples, len(left)), generator=generator)
    found = torch.tensor([spearman(left[draw], right[draw]) for draw in draws], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _per_parameter(values: dict[str, Tensor], cost: dict[str, float]) -> Tensor:
    return torch.cat([values[module] / cost[module] for module in MODULES])


def correlations(
    scores: Scores, chosen: dict[str, list[int]], truth: dict[str, Tensor]
) -> dict[str, tuple[float, float, float]]:
    """{"attention" | "mlp" | "both": (rho, low, high)} with its interval; "both" compares per parameter."""
    values = {module: getattr(scores, module)[chosen[module]] for module in MODULES}
    cost = {module: float(scores.units.layers[0].unit_parameters(module)) for module in MODULES}
    pairs = {module: (values[module], truth[module]) for module in MODULES}
    pairs["both"] = _per_parameter(values, cost), _per_parameter(truth, cost)
    return {name: (spearman(*pair), *interval(*pair)) for name, pair in pairs.items()}


def measure(name: str, channels: int, tokens: int, found: Path | None, calibration: dict[str, int]) -> list[Row]:
    model, tokenizer = load_model(name)
    statistics = calibrate(model, tokenizer, SMALL_MODEL / "calibration.jsonl", **calibration, seed=0, coupled=True)
    units = statistics.units
    order = torch.randperm(units.count("mlp"), generator=torch.Generator().manual_seed(0))
    chosen = {"attention": list(range(units.count("attention"))), "mlp": sorted(order[:channels].tolist())}
    ids = held_out(tokenizer, "selection", tokens).view(-1, 512)
    truth = loss_increases(model, units, ids, chosen, lambda text: print(text, flush=True))
    rows, table = [], {}
    for case in (case for case in CASES if case.group == "criteria"):
        table[case.name] = correlations(case.criterion(statistics), chosen, truth)
        for part, (rho, low, high) in table[case.name].items():
            rows.append(Row.single(f"{name}, {part}: {case.name} [{low:.2f}, {high:.2f}]", rho, "rho"))
    if found is not None:
        write_whole(found, json.dumps({"model": name, "channels": len(chosen["mlp"]), "rho": table}, indent=1) + "\n")
    return rows


def tasks(args: argparse.Namespace) -> list[Task]:
    if args.quick:
        return [Task("single units", lambda: measure(args.model, 8, 512, None, {"samples": 8, "seq_len": 128}))]
    return [
        Task(f"single units {args.model}", lambda: measure(args.model, args.channels, TOKENS, args.found, CALIBRATION))
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=SMALL_MODEL.name, choices=(SMALL_MODEL.name, "small_qwen2"))
    parser.add_argument("--channels", type=int, default=300, help="sampled from all layers (default 300)")
    parser.add_argument("--found", type=Path, help="write the correlations to this file")


if __name__ == "__main__":
    run_tasks(__doc__ or "", tasks, options)
