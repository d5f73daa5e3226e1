"""Perplexity after pruning and recovery: group-wise tuning against LoRA and LoRA quantised afterwards, same tokens.

``python -m benchmarks.recovery [--model small_model] [--text selection|report] [--ratios 0.5,0.2] [--seeds 0]
[--groups main,others,choices] [--match REGEX] [--cells FILE] [--set NAME=VALUE ...]``. The model is pruned by SAAP's
default, then tuned on the calibration text; hyper-parameters are chosen on the selection text, where ``--set`` tries
others, and numbers are reported on the report text. ``--cells`` writes every cell as it is measured; those already in
the file are not measured again, and refused if they were measured with other settings. ``recovery_table`` makes the
tables of docs/recovery.md of it.
"""

import argparse
import copy
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import saap
from benchmarks.common import SMALL_MODEL
from benchmarks.criteria import CALIBRATION, SAME_DENSE, held_out, load_model, positive, ratio_list, seed_list
from benchmarks.recovery_cases import CASES, DISTILLED, GROUPS, QUANTISED, Case
from benchmarks.recovery_cells import Cell, check_settings, read_cells, rows_of, said
from benchmarks.results import write_whole
from benchmarks.tasks import Task, run_tasks
from saap.data import load_documents, pack
from saap.evaluate import perplexity
from saap.quantised_linear import QuantisedLinear
from saap.recovery.settings import Settings

WINDOW = 512  # tokens that perplexity is measured over at once
TOKENS = 1_000_000  # more than any of the texts has


@dataclass(frozen=True)
class Ground:
    """What all cases of one model, text, ratio and seed share."""

    name: str
    text: str
    ratio: float
    seed: int
    dense: PreTrainedModel
    model: PreTrainedModel  # pruned
    tokenizer: PreTrainedTokenizerBase
    data: Any
    ids: Tensor
    perplexities: tuple[float, float]  # pruned, dense


def prepare(name: str, text: str, ratio: float, seed: int, calibration: dict[str, Any], tokens: int) -> Ground:
    """Prune by the default."""
    dense, tokenizer = load_model(name)
    data = load_documents(SMALL_MODEL / "calibration.jsonl")
    ids = held_out(tokenizer, text, tokens)
    settings = {**calibration, "seed": seed}
    pruned = saap.prune(copy.deepcopy(dense), tokenizer, data, ratio=ratio, ratio_of="blocks", **settings).model
    found = tuple(perplexity(each, tokenizer, [ids], seq_len=WINDOW) for each in (pruned, dense))
    return Ground(name, text, ratio, seed, dense, pruned, tokenizer, data, ids, (found[0], found[1]))


def measure_cells(ground: Ground, cases: Sequence[Case], kept: Sequence[Cell]) -> Iterator[Cell]:
    """Cells of ``cases`` that are not ``kept``; one training for all of equal settings, in order of the first."""
    _check_kept(kept, ground)
    known = {cell.key for cell in kept}
    left = [case for case in cases if (ground.name, ground.text, case.name, ground.ratio, ground.seed) not in known]
    for settings in dict.fromkeys(case.settings for case in left):
        start = time.perf_counter()
        tuned, tokens = copy.deepcopy(ground.model), 0
        if settings is not None:
            tuned, tokens = recovered(ground, replace(settings, seed=ground.seed))
        seconds = time.perf_counter() - start
        for case in left:
            if case.settings == settings:
                stored = store(copy.deepcopy(tuned), case.then, ground)
                yield Cell(
                    ground.name, ground.text, case.name, ground.ratio, ground.seed,
                    perplexity(stored, ground.tokenizer, [ground.ids], seq_len=WINDOW), *ground.perplexities,
                    linear_bytes(stored) / linear_bytes(ground.model), tokens, seconds, said(settings),
                )  # fmt: skip


def recovered(ground: Ground, settings: Settings) -> tuple[PreTrainedModel, int]:
    """The pruned model after ``saap.recover``, and the tokens that it was trained on."""
    settings = _with_highest_rank(ground.model, settings)
    teacher = ground.dense if settings.objective == DISTILLED else None
    model = copy.deepcopy(ground.model)
    done = saap.recover(model, ground.tokenizer, ground.data, teacher=teacher, held_out=0, **settings.used())
    return done.model, done.history.tokens


def _with_highest_rank(model: PreTrainedModel, settings: Settings) -> Settings:
    """Zero points alone cannot have a higher rank than the fewest groups of any Linear."""
    if settings.method != "groupwise" or settings.levels:
        return settings
    columns = min(each.in_features for name, each in model.named_modules() if _is_inner(name, each))
    return replace(settings, rank=min(settings.rank, -(-columns // settings.group_size)))


def store(model: PreTrainedModel, then: str, ground: Ground) -> PreTrainedModel:
    """``model`` as ``Case.then`` says, in place; GPTQ by the calibration text that trained it."""
    if not then:
        return model
    if then == "float16":
        return nn.Module.float(nn.Module.half(model))  # transformers refuses its own for quantised models
    data = {} if then != "gptq" else {"tokenizer": ground.tokenizer, "data": _sequences(ground)}
    return saap.quantise(model, **QUANTISED, rounding=then, **data)


def _sequences(ground: Ground) -> Tensor:
    return pack(ground.tokenizer, ground.data, samples=CALIBRATION["samples"], seq_len=CALIBRATION["seq_len"])


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the decoder layers' Linear weights as stored with 16-bit weights, scales and zero points."""
    total = 0
    for name, module in model.named_modules():
        if not _is_inner(name, module):
            continue
        if isinstance(module, QuantisedLinear):
            stored = module.stored()
            total += stored["qweight"].nbytes + 2 * (stored["qscale"].numel() + stored["qzero"].numel())
        else:
            total += 2 * module.weight.numel()
    return total


def _is_inner(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def _check_kept(kept: Sequence[Cell], ground: Ground) -> None:
    same = (ground.name, ground.text, ground.ratio, ground.seed)
    for cell in kept:
        if (cell.model, cell.text, cell.ratio, cell.seed) != same:
            continue
        for what, old, new in zip(("pruned", "dense"), (cell.pruned, cell.dense), ground.perplexities, strict=True):
            if abs(old / new - 1) > SAME_DENSE:
                raise ValueError(
                    f"expected cells of the same text and pruning: of those kept of {cell.model} on the {cell.text} "
                    f"text at {cell.ratio:.0%} the {what} perplexity is {old:.4f}, here it is {new:.4f}"
                )


def chosen_cases(groups: Sequence[str], match: str, changes: dict[str, Any]) -> list[Case]:
    """Cases by group and name; ``changes`` of their settings are added to the names. SystemExit for none."""
    cases = [case for case in CASES if case.group in groups and re.search(match, case.name)]
    if changes:
        suffix = "".join(f", {name}={value}" for name, value in changes.items())
        cases = [
            replace(case, name=case.name + suffix, settings=replace(case.settings, **changes))
            for case in cases
            if case.settings is not None
        ]
    if not cases:
        raise SystemExit(f"error: no case of {', '.join(groups)} matches {match!r}")
    return cases


def tasks(args: argparse.Namespace) -> list[Task]:
    cases = chosen_cases(args.groups, args.match, dict(args.set))
    if args.quick:
        few = [each if each.settings is None else replace(each, settings=_short(each.settings)) for each in cases[:9]]
        return [Task("recovery, quick", lambda: rows_of(list(_quick(args.model, few))))]
    return [Task(f"recovery {args.model} {args.text}", lambda: rows_of(measure_and_write(args, cases)))]


def _short(settings: Settings) -> Settings:
    return replace(settings, tokens=4096, seq_len=128)


def _quick(name: str, cases: Sequence[Case]) -> Iterator[Cell]:
    """Little text in all respects: a smoke test."""
    ground = prepare(name, "selection", 0.5, 0, {"samples": 8, "seq_len": 128}, 1024)
    yield from measure_cells(ground, cases, [])


def measure_and_write(args: argparse.Namespace, cases: Sequence[Case]) -> list[Cell]:
    """The cells of ``cases`` and the other arguments: those in ``args.cells``, and the rest, which is added to it."""
    cells = read_cells(args.cells) if args.cells and args.cells.exists() else []
    check_settings(cells, cases)
    chosen = set()
    for seed in args.seeds:
        for ratio in args.ratios:
            here = {(args.model, args.text, case.name, ratio, seed) for case in cases}
            chosen |= here
            if here <= {cell.key for cell in cells}:
                continue
            ground = prepare(args.model, args.text, ratio, seed, CALIBRATION, args.tokens)
            for cell in measure_cells(ground, cases, list(cells)):
                cells.append(cell)
                print(_line(cell), flush=True)
                if args.cells:
                    write_whole(args.cells, json.dumps([vars(each) for each in cells], indent=0) + "\n")
    return [cell for cell in cells if cell.key in chosen]


def _line(cell: Cell) -> str:
    return (
        f"{cell.case}, {cell.ratio:.0%}, seed {cell.seed}: {cell.perplexity:.3f} of {cell.pruned:.3f} pruned and "
        f"{cell.dense:.3f} dense, recovered {cell.recovered:.3f}, {cell.seconds:.0f} s"
    )


def _groups(text: str) -> tuple[str, ...]:
    if not set(text.split(",")) <= set(GROUPS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(GROUPS)}; got {text!r}")
    return tuple(text.split(","))


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression; got {text!r}: {error}") from error
    return text


def _change(text: str) -> tuple[str, Any]:
    """A setting and its value, as JSON where it is JSON."""
    name, _, value = text.partition("=")
    if name == "patience":
        raise argparse.ArgumentTypeError("patience needs held-out text, of which this benchmark takes none")
    if name not in {field.name for field in fields(Settings)} or not value:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE with the name of a setting of recovery; got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=SMALL_MODEL.name, choices=(SMALL_MODEL.name, "small_qwen2"))
    parser.add_argument("--text", default="selection", choices=("selection", "report"))
    parser.add_argument("--ratios", type=ratio_list, default=(0.5, 0.2), help="of the blocks (default 0.5,0.2)")
    parser.add_argument("--seeds", type=seed_list, default=(0,), help="of calibration and training (default 0)")
    parser.add_argument("--groups", type=_groups, default=("main",), help=f"of {', '.join(GROUPS)} (default main)")
    parser.add_argument("--match", type=_pattern, default="", help="regular expression: only cases with it in the name")
    parser.add_argument("--tokens", type=positive, default=TOKENS, help="of the text (default: all of it)")
    parser.add_argument("--cells", type=Path, help="keep the cells in this file, and add those that it lacks")
    parser.add_argument("--set", type=_change, nargs="+", default=[], metavar="NAME=VALUE", help="other settings")


if __name__ == "__main__":
    run_tasks(__doc__ or "", tasks, options)
