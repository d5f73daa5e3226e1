"""Packed weights with few tokens, as in decoding: ours with every storage against torch's Linear on a dense weight.

``python -m benchmarks.decode [--quick] [--tokens T ...] [--switch] [--json FILE] [--results DIRECTORY]``.

x and the dense weight are fp32 on the CPU and bf16 on a GPU; ``linear`` is compared with F.linear, ``gated_linear``
with two F.linear, SiLU and a product. All variants run in turn, each on weights that together exceed the caches.
GB/s is the packed weight, read once. ``--switch`` compares the two paths of the CPU backend over tokens instead: the
kernel that reads the weight as it is stored, and torch.mm on panels of it (saap_kernels.cpu_linear.KERNEL_TOKENS).
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.calibration_kernels import device_kind
from benchmarks.common import Row
from benchmarks.tasks import Task, run_tasks
from benchmarks.timing import Variant, interleave
from saap_kernels import PackedWeight, cpu_linear, gated_linear, linear, pack
from saap_kernels.packed import LINE

SHAPES = ((4096, 11008), (11008, 4096), (4096, 8807), (8807, 4096))  # (N, K): Llama-2-7B's MLP, and cut by a fifth
QUICK = ((96, 331), (331, 96))
TOKENS, SWITCH_TOKENS = (1, 4, 16), (16, 32, 64, 128, 256)
ROTATED_BYTES = 256 << 20  # weights of one variant together, past any cache
REPEATS = 21
ASKED = {("int8", 1): "<= 0.50", ("int4", 1): "<= 0.50"}  # of torch's milliseconds in fp32 on the CPU, linear


@dataclass(frozen=True)
class Problem:
    """One weight (N, K), or gate and up (2, N, K), and how many tokens meet it."""

    rows: int
    columns: int
    tokens: int
    gated: bool

    @property
    def case(self) -> str:
        op = "gated_linear" if self.gated else "linear"
        return f"{op} {self.rows}x{self.columns}, {self.tokens} token{'s' if self.tokens > 1 else ''}"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default: {TOKENS}, with --switch {SWITCH_TOKENS}")
    parser.add_argument("--switch", action="store_true", help="the CPU backend's kernel against its panels")


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """Every shape with one token, then with more; a gated product where its weight is the wider one."""
    if args.switch and device_kind() != "cpu":
        raise SystemExit("--switch: expected a machine without CUDA: it compares paths of the CPU backend")
    measure = switch_rows if args.switch else decode_rows
    for tokens in args.tokens or (SWITCH_TOKENS if args.switch else TOKENS):
        for rows, columns in QUICK if args.quick else SHAPES:
            for gated in (False, True) if rows > columns else (False,):
                problem = Problem(rows, columns, tokens, gated)
                repeats = 3 if args.quick else REPEATS
                yield Task(problem.case, partial(measure, problem, repeats, device_kind(), args.quick))


def dense_weight(problem: Problem, device: str) -> Tensor:
    shape = (2, problem.rows, problem.columns) if problem.gated else (problem.rows, problem.columns)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device) / problem.columns**0.5
    return weight if device == "cpu" else weight.bfloat16()


def stored_weights(weight: Tensor) -> dict[str, PackedWeight]:
    """{name: packed} of every storage that ``weight`` is measured with."""
    if weight.dtype == torch.bfloat16:
        found = {"bf16": pack(weight)}
    else:
        found = {"fp32": pack(weight), "bf16": pack(weight.bfloat16()), "fp16": pack(weight.half())}
    return {"int8": pack(weight, bits=8), "int4": pack(weight, bits=4)} | found


def copies(packed: PackedWeight, quick: bool) -> list[PackedWeight]:
    """Enough of it to rotate past the caches."""
    names = [name for name in ("data", "scale", "zero") if getattr(packed, name) is not None]
    return [
        replace(packed, **{name: getattr(packed, name).clone() for name in names})
        for _ in range(sets_of(packed.nbytes, quick))
    ]


def sets_of(size: int, quick: bool) -> int:
    return 2 if quick else max(2, -(-ROTATED_BYTES // size))


def rotated(weights: Sequence[Any], call: Callable[..., object]) -> Variant:
    return lambda index: call(weights[index % len(weights)])


def decode_rows(problem: Problem, repeats: int, device: str, quick: bool) -> Iterator[Row]:
    """Milliseconds against torch's and GB/s of the packed weight, for every storage."""
    weight = dense_weight(problem, device)
    x = torch.randn(problem.tokens, problem.columns, device=device).to(weight.dtype)
    sets = {name: copies(packed, quick) for name, packed in stored_weights(weight).items()}
    dense = [weight.clone() for _ in range(sets_of(weight.nbytes, quick))]
    variants = {"torch": rotated(dense, partial(torch_product, problem, x))}
    variants |= {name: rotated(weights, partial(our_product, problem, x)) for name, weights in sets.items()}
    seconds = interleave(variants, repeats, max(map(len, sets.values())), device)
    peer = "torch fp32" if device == "cpu" else "torch bf16"
    for name, weights in sets.items():
        asked = "" if problem.gated or device != "cpu" or quick else ASKED.get((name, problem.tokens), "")
        case = f"{problem.case}, {name}"
        yield Row.compare(f"{case} / {peer}", seconds[name] * 1e3, seconds["torch"] * 1e3, "ms", asked)
        yield Row.single(f"{case}, weight read", weights[0].nbytes / seconds[name] / 1e9, "GB/s")


def our_product(problem: Problem, x: Tensor, packed: PackedWeight) -> Tensor:
    return gated_linear(x, packed, activation="silu") if problem.gated else linear(x, packed)


def torch_product(problem: Problem, x: Tensor, weight: Tensor) -> Tensor:
    if not problem.gated:
        return functional.linear(x, weight)
    return functional.silu(functional.linear(x, weight[0])) * functional.linear(x, weight[1])


def switch_rows(problem: Problem, repeats: int, device: str, quick: bool) -> Iterator[Row]:
    """The kernel against panels, for every storage."""
    x = functional.pad(torch.randn(problem.tokens, problem.columns), (0, -problem.columns % LINE))
    paths = [cpu_linear.kernel_linear, cpu_linear.panel_linear]
    rest: tuple[str, ...] = ()
    if problem.gated:
        paths, rest = [cpu_linear.kernel_gated, cpu_linear.panel_gated], ("silu",)
    for name, packed in stored_weights(dense_weight(problem, device)).items():
        sets = copies(packed, quick)
        variants = {
            path.__name__: rotated(sets, lambda weight, path=path: path(x, weight, None, *rest)) for path in paths
        }
        kernel, panels = interleave(variants, repeats, len(sets), device).values()
        yield Row.compare(f"{problem.case}, {name}: kernel / panels", kernel * 1e3, panels * 1e3, "ms")


if __name__ == "__main__":
    run_tasks(__doc__ or "", tasks, options)
