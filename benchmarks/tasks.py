"""Command line of a benchmark module: tasks in order, rows printed and written as they come, within a time budget."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import Row, print_header, print_missed, print_row
from benchmarks.results import Results, write_whole


@dataclass(frozen=True)
class Task:
    """Rows that are measured together, under a name that tells them from those of other tasks."""

    name: str
    measure: Callable[[], Iterable[Row]]


def run(question: str, measure: Callable[[bool], Iterable[Row]]) -> None:
    """Command line of a module that is one task; ``measure(quick)`` may yield its rows one by one."""
    name = Path(sys.argv[0]).stem
    run_tasks(question, lambda args: [Task(name, lambda: measure(args.quick))])


def run_or_measure(
    question: str, measure: Callable[[bool], Iterable[Row]], measure_variant: Callable[[str, bool], dict[str, float]]
) -> None:
    """``run`` for a module whose ``--variant NAME`` prints what one variant measured, as JSON."""
    if "--variant" not in sys.argv:
        run(question, measure)
        return
    chosen = sys.argv[sys.argv.index("--variant") + 1]
    print(json.dumps(measure_variant(chosen, "--quick" in sys.argv)))


def run_tasks(
    question: str,
    tasks: Callable[[argparse.Namespace], Iterable[Task]],
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Measure every task, in order, that the options and the time allow; ``options`` adds a module's own."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--resume", action="store_true", help="leave out tasks that --results already holds")
    if options is not None:
        options(parser)
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * (args.minutes or float("inf"))
    results = None if args.results is None else Results(args.results)
    rows: list[Row] = []
    print_header()
    left = list(tasks(args))
    while left and time.monotonic() < deadline:
        task = left.pop(0)
        if args.resume and results is not None and task.name in results.finished:
            print(f"{task.name}: measured before")
            continue
        first = len(rows)
        for row in task.measure():
            rows.append(row)
            print_row(row)
            if results is not None:
                results.add(task.name, row)
            if args.json is not None:
                write_json(args.json, rows)
        if results is not None:
            results.finish(task.name, rows[first:])
    if left:
        print(f"out of time; not measured: {', '.join(task.name for task in left)}")
    if rows:
        print_missed(rows)
        print(f"device: {rows[0].device}")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What ``benchmarks.run`` and every module understand."""
    parser.add_argument("--quick", action="store_true", help="smaller shapes, a smoke test rather than a measurement")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--results", type=Path, help="merge the rows into DEVICE.json and DEVICE.md of this directory")
    parser.add_argument("--minutes", type=float, help="start no task after this time (default: no limit)")


def write_json(path: Path, rows: Sequence[Row]) -> None:
    write_whole(path, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
