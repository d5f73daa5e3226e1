"""The calibration ops against eager torch, torch.compile and bare dW, per projection shape.

Peers (benchmarks.eager_forms): of weight_salience, "eager" forms dW of each sequence, multiplies, takes the three
orders and sums; "tiled" is the strongest eager form, in panels that stay in the cache; "compiled" and "compiled
tiled" have what follows the product under torch.compile; "dW" is the bare product of all tokens, with nothing
reduced. coupled_salience: "eager" and "compiled" add s and its square in fp32. Activation ops: "strongest eager" is
a mask's gradient, and norms. "cuda" is the CUDA C++ backend beside the default one. CPU: fp32, two shapes; CUDA:
bf16, all shapes. Ratios are ours / peer in time, variants interleaved, operands rotated past the caches. The
roofline is one read of the operands, or the arithmetic at the rate of a large product, whichever takes longer.
Memory is the peak of one call above the operands.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch

import saap_kernels
from benchmarks import activation_rows, weight_salience_rows
from benchmarks.common import Row
from benchmarks.shapes import MODELS, TOKENS, Projection
from benchmarks.tasks import Task, run_tasks
from benchmarks.timing import Rates, measured_rates
from benchmarks.weight_salience_rows import Problem

OPS = ("weight_salience", *activation_rows.OPERANDS)
QUICK = (Projection("small gate", 512, 384, "out", 1), Projection("small o", 384, 512, "in", 128))
# tokens, features, tokens of a sequence; every operand on a GPU has 256 MB or more
EXTENTS = {"quick": ((1024, 1000, 128),), "cpu": ((8192, 4096, 128),)}
EXTENTS["cuda"] = ((16384, 8192, 128), (32768, 11008, 2048))
REPEATS = {"quick": 3, "cpu": 3, "cuda": 21}


def options(parser: argparse.ArgumentParser) -> None:
    tokens = [f"{sequences}x{length}" for sequences, length in TOKENS]
    peers = sorted({*weight_salience_rows.PEERS, *activation_rows.PEERS})
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--tokens", nargs="+", choices=tokens, metavar="SxT", help=", ".join(tokens))
    parser.add_argument("--variants", nargs="+", choices=peers, metavar="PEER", help=", ".join(peers))


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """Ceilings, then the shapes that are asked for, by tokens; the memory-bound ops after the first tokens."""
    device = device_kind()
    rates = measured_rates(args.quick)
    yield Task("ceilings", partial(ceilings, rates))
    for index, (sequences, length) in enumerate(chosen_tokens(args, device)):
        for shape in chosen_shapes(args, device) if "weight_salience" in args.ops else ():
            problem = Problem(shape, sequences, length)
            yield Task(f"weight_salience {problem.case}", partial(_weights, problem, rates, args))
        for extent in EXTENTS["quick" if args.quick else device] if index == 0 else ():
            for op in (op for op in args.ops if op in activation_rows.OPERANDS):
                yield Task(f"{op} {extent}", partial(_activations, op, extent, rates, args))


def device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_shapes(args: argparse.Namespace, device: str) -> list[Projection]:
    """The shapes of one run; those of the MLP first, which hold most of a model's weights."""
    if args.quick:
        return list(QUICK)
    if device == "cpu" and not args.models:
        return list(MODELS["Llama-2-7B"][3:])
    return [shape for name in args.models or MODELS for shape in reversed(MODELS[name])]


def chosen_tokens(args: argparse.Namespace, device: str) -> list[tuple[int, int]]:
    if args.quick:
        return [(4, 64)]
    if args.tokens:
        return [(sequences, length) for sequences, length in TOKENS if f"{sequences}x{length}" in args.tokens]
    return list(TOKENS) if device == "cuda" else [TOKENS[0]]


def ceilings(rates: Rates) -> list[Row]:
    return [
        Row.single("read bandwidth", rates.read_bytes / 1e9, "GB/s"),
        Row.single("matmul peak", rates.flops / 1e12, "TFLOP/s"),
    ]


def _weights(problem: Problem, rates: Rates, args: argparse.Namespace) -> Iterator[Row]:
    on_gpu = rates.device == "cuda"
    default = weight_salience_rows.default_peers(problem.length, on_gpu, args.quick)
    peers = _runnable(args.variants or default)
    return weight_salience_rows.weight_rows(problem, rates, _repeats(args, rates), peers, on_gpu)


def _activations(op: str, extent: tuple[int, int, int], rates: Rates, args: argparse.Namespace) -> Iterator[Row]:
    on_gpu = rates.device == "cuda"
    peers = _runnable(args.variants or activation_rows.default_peers(on_gpu, args.quick))
    return activation_rows.activation_rows(op, extent, rates, _repeats(args, rates), peers, on_gpu)


def _repeats(args: argparse.Namespace, rates: Rates) -> int:
    return REPEATS["quick" if args.quick else rates.device]


def _runnable(peers: tuple[str, ...]) -> tuple[str, ...]:
    """Without the CUDA C++ backend where it cannot run, or where it is the only one and so ours."""
    found = saap_kernels.available_backends()
    both = found["cuda"] == "ok" and found["triton"] == "ok"
    return tuple(name for name in peers if name != "cuda" or both)


if __name__ == "__main__":
    run_tasks(__doc__ or "", tasks, options)
