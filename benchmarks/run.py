"""Run every benchmark, the most valuable rows first, each module in a process of its own.

``python -m benchmarks.run [--quick] [--json FILE] [--results DIRECTORY] [--minutes M] [--only NAME ...] [--resume]``.
Modules print and write each row as they measure it; one that is still running when the time is up is stopped.
The exit code is 1 when a module failed, whatever the others did.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import Row
from benchmarks.shapes import MODELS
from benchmarks.tasks import add_common_options, write_json

FIRST = next(iter(MODELS))  # the model whose projections are measured before anything else
# module and options; torch_pruning_taylor measures a CPU and needs its peer's package: it is run alone
BENCHMARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("calibration_kernels", ("--models", FIRST)),
    ("calibrate_model", ()),
    ("compact_gemm", ("--models", FIRST)),
    ("calibrate_streamed", ()),
    ("calibration_kernels", ("--ops", "weight_salience", "--models", *list(MODELS)[1:])),
    ("compact_gemm", ("--models", "Llama-3-8B", "Qwen2.5-7B")),
    ("decode", ()),
    ("replan", ()),
    ("latency_table", ()),
    ("least_squares", ()),
    ("criteria", ()),
    ("compensation", ()),
    ("end_to_end", ()),
    ("recovery_step", ()),
    ("quantised", ()),
    ("quantisation_rounding", ()),
    ("target_cost", ()),
)
LEAST_SECONDS = 20  # with less time left no module is started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    names = sorted({name for name, _ in BENCHMARKS})
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--resume", action="store_true", help="leave out tasks that --results already holds")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the module is stopped too
    end = time.monotonic() + 60 * (args.minutes or float("inf"))
    chosen = [(name, options) for name, options in BENCHMARKS if name in args.only]
    if args.quick:
        chosen = [(name, ()) for name in dict(chosen)]  # small shapes belong to no model
    failed, rows = [], []
    for index, (name, options) in enumerate(chosen):
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"out of time; not run: {', '.join(name for name, _ in chosen[index:])}", flush=True)
            break
        print(f"\n== benchmarks.{name} {' '.join(options)}", flush=True)
        good, found = run_module(name, [*options, *_passed_on(args, left)], left)
        rows += found
        failed += [] if good else [name]
        if args.json is not None:
            write_json(args.json, rows)
    if failed:
        raise SystemExit(f"error: failed: {', '.join(failed)}; the other rows are written")


def _passed_on(args: argparse.Namespace, seconds: float) -> list[str]:
    """Options that a module takes over."""
    options = ["--quick"] * args.quick + ["--resume"] * args.resume
    if args.results is not None:
        options += ["--results", str(args.results)]
    return options if seconds == float("inf") else [*options, "--minutes", f"{seconds / 60:.3f}"]


def run_module(name: str, options: list[str], seconds: float) -> tuple[bool, list[Row]]:
    """Whether ``benchmarks.name`` did not fail, and its rows; it and what it started are stopped after ``seconds``.

    A process of its own gives back every byte of GPU memory before the next module.
    """
    with tempfile.TemporaryDirectory(prefix="saap-rows-") as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", str(file)]
        process = subprocess.Popen(command, preexec_fn=os.setpgrp)  # a group, to stop what it starts too
        try:
            good = process.wait(None if seconds == float("inf") else seconds) == 0
        except subprocess.TimeoutExpired:
            print(f"out of time: benchmarks.{name} stopped; the rows above are written", flush=True)
            good = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return good, [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []


if __name__ == "__main__":
    main()
