"""Run every benchmark: ``python -m benchmarks.run [--quick] [--json FILE]``."""

import argparse
import importlib
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import print_rows

BENCHMARKS = ("replan", "calibration_kernels", "calibrate_model", "criteria")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, a smoke test rather than a measurement")
    parser.add_argument("--json", type=Path, help="also write all rows to this file")
    args = parser.parse_args()
    rows = []
    for name in BENCHMARKS:
        print(f"\n== benchmarks.{name}", flush=True)
        found = importlib.import_module(f"benchmarks.{name}").measure(args.quick)
        print_rows(found)
        rows.extend(asdict(row) for row in found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
