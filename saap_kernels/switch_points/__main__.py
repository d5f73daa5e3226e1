"""``python -m saap_kernels.switch_points``: measure on this machine from how many tokens on torch's GEMM is faster."""

import argparse
from pathlib import Path

import torch

from saap_kernels.switch_points import status, table
from saap_kernels.switch_points.measure import measure_switch_points


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m saap_kernels.switch_points", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f'"cuda", "cuda:1" or "cpu" (default here: {default})')
    parser.add_argument("--quick", action="store_true", help="fewer shapes, token counts and repeats")
    parser.add_argument("--out", type=Path, help=f"the file to write (default: {table.location()})")
    parser.add_argument("--status", action="store_true", help="say what is known of the device, and measure nothing")
    args = parser.parse_args()
    try:
        if args.status:
            print(status(args.device))
            return
        points = measure_switch_points(args.device, quick=args.quick, file=args.out, report=print)
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(points)} kinds of products, written to {args.out or table.location()}")


if __name__ == "__main__":
    main()
