"""The paper's evaluation in one command: prune 7B models, measure perplexity and seven zero-shot tasks, write a table.

``python -m benchmarks.protocol_7b`` needs a GPU and the hub; ``--dry-run`` says what for. Each cell (model, ratio,
criterion, seed) is written when it is done, and a second run goes on where the first stopped. Without the hub, every
step runs on the small model:

    python -m benchmarks.protocol_7b --models benchmarks/small_model --ratios 0.2 --seeds 0 \\
        --calibration benchmarks/small_model/calibration.jsonl --seq-len 256 --seq-lens 128,512 \\
        --perplexity-data report=benchmarks/small_model/report.jsonl \\
        --task-folder benchmarks/local_tasks --out build/protocol_small
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.protocol_cells import Cell, Inputs, Settings, free_memory, run_cell
from benchmarks.protocol_models import (
    KNOWN,
    Model,
    check_coupled_memory,
    check_model,
    needs,
    parse_models,
    tokenizer_of,
)
from benchmarks.protocol_table import numbers_of, read_results, write_table
from benchmarks.protocol_texts import TEXTS, check_text, describe, joined, load_text, parse_texts, token_ids
from benchmarks.zero_shot import TASKS, check_tasks
from saap.console import quiet_libraries
from saap.criteria import CRITERIA, needs_coupled
from saap.pipeline import parse_ratios
from saap.plan import write_atomically
from saap.search import METHODS

RESULTS, TABLE = Path("build/protocol_7b"), Path("docs/protocol_7b.md")


def _numbers(text: str) -> tuple[int, ...]:
    pieces = text.split(",")
    if not all(piece.isdecimal() for piece in pieces) or len(set(pieces)) != len(pieces):
        raise argparse.ArgumentTypeError(f"expected different whole numbers such as 128,2048; got {text!r}")
    return tuple(map(int, pieces))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=list(KNOWN), help=f"{', '.join(KNOWN)} (default: all), hub names or directories")
    add("--ratios", default="0.2,0.5", help="shares of all parameters to remove (default 0.2,0.5)")
    add("--criteria", type=_names, default=("saap", "element"), help=f"of {', '.join(CRITERIA)} (default saap,element)")
    add("--method", choices=METHODS, default="global", help="the search (default global)")
    add("--seeds", type=_numbers, default=(0, 1, 2, 3, 4), help="calibration seeds (default 0,1,2,3,4)")
    add("--calibration", default="bookcorpus", help="bookcorpus (default), c4, hub:NAME[:CONFIG], a .txt or a .jsonl")
    add("--samples", type=int, default=128, help="calibration sequences (default 128)")
    add("--seq-len", type=int, default=512, help="tokens per calibration sequence (default 512)")
    add("--perplexity-data", nargs="+", default=["wikitext2", "ptb"], help=f"of {', '.join(TEXTS)}, or NAME=FILE")
    add("--seq-lens", type=_numbers, default=(128, 2048), help="window lengths (default 128,2048)")
    add("--tasks", type=_names, default=tuple(TASKS), help=f"of {','.join(TASKS)} (default: all)")
    add("--task-folder", help="rows of each task in TASK.jsonl here instead of the hub's")
    add("--limit", type=int, help="only the first rows of each task: to try the command")
    add("--batch-size", type=int, default=8, help="zero-shot requests at a time (default 8)")
    add("--dtype", help="float32, bfloat16 or float16 instead of each model's own")
    add("--out", type=Path, help=f"results, and table.md (default: results in {RESULTS}, the table is {TABLE})")
    add("--keep-checkpoints", action="store_true", help="keep each cell's pruned model, not only its plan")
    add("--dry-run", action="store_true", help="print the grid and what it needs; ask no hub, write nothing")
    add("--table-only", action="store_true", help="write the table of what is done so far")
    return parser.parse_args(given)


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        args.calibration, args.samples, args.seq_len, args.method, args.dtype, parse_texts(args.perplexity_data),
        args.seq_lens, args.tasks, args.task_folder, args.limit, args.batch_size,
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused without the hub; raises ValueError or FileNotFoundError naming the option."""
    unknown = [name for name in args.criteria if name not in CRITERIA]
    if unknown or len(set(args.criteria)) != len(args.criteria):
        raise ValueError(f"--criteria: expected different ones of {', '.join(CRITERIA)}; got {','.join(args.criteria)}")
    for option, value, least in (
        ("--samples", args.samples, 1), ("--seq-len", args.seq_len, 2), ("--seq-lens", min(args.seq_lens), 2),
        ("--limit", args.limit, 1), ("--batch-size", args.batch_size, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"{option}: expected at least {least}; got {value}")
    check_text(args.calibration, "--calibration")
    check_tasks(args.tasks, None if args.task_folder is None else Path(args.task_folder))


def grid(models: list[Model], ratios: tuple[float, ...], args: argparse.Namespace) -> list[Cell]:
    """All cells, the first seed of every model first, so that an early table already has every row."""
    dense = [Cell(model) for model in models]
    pruned = [
        Cell(model, ratio, criterion, seed)
        for seed in args.seeds
        for model in models
        for ratio in ratios
        for criterion in args.criteria
    ]
    return dense + pruned


def refuse_changes(out: Path, recorded: dict[str, Any]) -> None:
    """Raise ValueError naming what differs when ``out`` was begun with other settings."""
    file = out / "settings.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key in sorted(before.keys() | recorded.keys()) if before.get(key) != recorded.get(key)]
    if changed:
        differences = "; ".join(f"{key}: {before.get(key)} there, {recorded.get(key)} now" for key in changed)
        raise ValueError(f"{out} holds results of other settings ({differences}); choose another --out")


def read_inputs(
    models: list[Model], ratios: tuple[float, ...], settings: Settings, coupled: Sequence[Model] = ()
) -> Inputs:
    """Load all texts and every model's configuration and tokenizer, so that a long run does not fail late.

    ``coupled`` are those whose coupled statistics are to be measured, for which there must be memory.
    """
    inputs = Inputs(
        load_text(settings.calibration), {name: joined(source) for name, source in settings.perplexity_data.items()}
    )
    longest = max(settings.seq_lens)
    for model in models:
        check_model(model, ratios, settings.method, (*settings.seq_lens, settings.seq_len))
        if model in coupled:
            check_coupled_memory(model, settings.samples, settings.seq_len, settings.dtype)
        tokenizer = tokenizer_of(model)
        for name, text in inputs.texts.items():
            tokens = len(token_ids(tokenizer, text))
            if tokens < longest:
                raise ValueError(f"--perplexity-data: {name} has {tokens} tokens, fewer than one window of {longest}")
    return inputs


def print_needs(cells: list[Cell], models: list[Model], ratios: tuple[float, ...], settings: Settings) -> None:
    print(f"{len(cells)} cells:")
    for cell in cells:
        print(f"  {cell.label}")
    for model in models:
        print(f"{model.name} ({model.path}):")
        for what, need in needs(model, ratios, settings.seq_len, settings.batch_size).items():
            print(f"  {what}: {need}")
    print(f"calibration: {describe(settings.calibration)}")
    for name, source in settings.perplexity_data.items():
        print(f"perplexity {name}: {describe(source)}")
    print(f"tasks: {', '.join(settings.tasks)}, rows from {settings.task_folder or 'the hub'}")
    print("nothing was done")


def run(args: argparse.Namespace) -> None:
    check(args)
    models, ratios, settings = parse_models(args.models), parse_ratios(args.ratios, None), settings_of(args)
    cells = grid(models, ratios, args)
    if args.dry_run:
        print_needs(cells, models, ratios, settings)
        return
    out, table = (RESULTS, TABLE) if args.out is None else (args.out, args.out / "table.md")
    recorded = settings.recorded()
    refuse_changes(out, recorded)
    todo = [] if args.table_only else [cell for cell in cells if not cell.result(out).is_file()]
    if not todo:
        write_table(table, cells, read_results(out), settings)
        print(f"wrote {table}" if args.table_only else f"{len(cells)} of {len(cells)} cells are done; wrote {table}")
        return
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are done")
    coupled = [
        cell.model for cell in todo if needs_coupled(cell.criterion or "") and not cell.statistics(out).is_file()
    ]
    inputs = read_inputs(sorted({cell.model for cell in todo}, key=models.index), ratios, settings, coupled)
    write_atomically(out / "settings.json", json.dumps(recorded, indent=2) + "\n")
    for number, cell in enumerate(todo, start=1):
        start = time.perf_counter()
        found = numbers_of(run_cell(cell, settings, inputs, out, args.keep_checkpoints))
        write_table(table, cells, read_results(out), settings)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        print(f"[{number}/{len(todo)}] {cell.label}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
        free_memory()
    print(f"wrote {table}")


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    quiet_libraries()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
