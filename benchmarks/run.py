"""Run every benchmark: ``python -m benchmarks.run [--quick] [--json FILE] [--results DIRECTORY]``."""

import argparse
import importlib
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.common import Row, print_rows

# torch_pruning_taylor measures a CPU and needs its peer's package: it is run alone
BENCHMARKS = (
    "replan", "calibration_kernels", "calibrate_model", "calibrate_streamed", "criteria", "compensation",
    "least_squares",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, a smoke test rather than a measurement")
    parser.add_argument("--json", type=Path, help="also write all rows to this file")
    parser.add_argument("--results", type=Path, help="write DEVICE.json and DEVICE.md to this directory")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in BENCHMARKS:
        print(f"\n== benchmarks.{name}", flush=True)
        found = importlib.import_module(f"benchmarks.{name}").measure(args.quick)
        print_rows(found)
        rows.extend(found)
        for folder in [args.results] if args.results else []:  # after each, so that a late failure loses nothing
            write_results(folder, rows)
    if args.json:
        write_json(args.json, rows)


def write_json(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def write_results(folder: Path, rows: Sequence[Row]) -> None:
    """One JSON and one Markdown table for this device, replacing older ones."""
    name = re.sub(r"[^a-z0-9]+", "-", hardware_name().lower()).strip("-")
    write_json(folder / f"{name}.json", rows)
    versions = f"torch {torch.__version__}, triton {triton_version()}"
    lines = [f"# {hardware_name()}", "", f"{versions}, {date.today()}; `python -m benchmarks.run`", ""]
    lines += ["| case | ours | peer | ratio | unit | asked |", "|---|---|---|---|---|---|"]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.3f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        lines.append(f"| {row.case} | {row.ours:.3f} | {peer} | {ratio} | {row.unit} | {row.asked} |")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def hardware_name() -> str:
    """The CUDA device's name, or the processor's architecture and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.get_num_threads()} threads"


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
