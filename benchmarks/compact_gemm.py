"""Products of pruned MLPs: the ops on packed weights against torch, torch.compile, Liger-Kernel and torchao.

Widths are those of plans for Llama-2-7B, Llama-3-8B and Qwen2.5-7B that take 20 and 50 % of the MLPs
(benchmarks.compact_widths): an odd one of each plan, and one of every remainder mod 16. "up" is x (T, D) by (F, D),
"down" h (T, F) by (D, F), "gated_mlp" all three products. Peers: "F.linear" on contiguous weights of that width,
"F.linear padded" on weights and inputs padded to multiples of 64 (of gated_mlp: three of either, and torch's
activation), "compiled" the former by torch.compile with max-autotune (CUDA only), "Liger" three padded products and
Liger-Kernel's fused SiLU, "torchao" weight-only int8 and int4. Beside int8 and int4, F.linear runs the unquantised
weight. Ratios are ours / peer in time, variants interleaved, operands rotated past the caches, CUDA graphs. CUDA:
bf16; CPU: fp32, few tokens. The roofline is one read of the weights, or the arithmetic at the rate of a large product.
``--figure FILE`` draws time against width.
"""

import argparse
import math
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.common import Row
from benchmarks.compact_figure import Point, draw
from benchmarks.compact_peers import OPS, PEERS, ROTATED_BYTES, Operands, Product, variants_of
from benchmarks.compact_widths import LAYERS, RATIOS, Mlp, every_residue, typical
from benchmarks.results import write_whole
from benchmarks.tasks import Task, run_tasks
from benchmarks.timing import Rates, interleave, measured_rates

TOKENS = {"cuda": (1, 4, 16, 256, 2048, 8192), "cpu": (1, 4, 16), "quick": (1, 20)}
FIGURE_TOKENS = {"cuda": (16, 2048), "cpu": (1,), "quick": (20,)}
REPEATS = {"cuda": 21, "cpu": 5, "quick": 3}
QUICK = [Mlp("small", 128, width) for width in (331, 336)]
DECODE, PREFILL = 16, 2048  # tokens: at most, and at least
MEGABYTE = 1e6
# of a GPU, by the bytes of one read of the bf16 weight
READING = ((90 * MEGABYTE, ">= 0.85"), (32 * MEGABYTE, ">= 0.75"))  # share of the read bandwidth, bf16, one token
INT4 = ((200 * MEGABYTE, 1 / 3), (90 * MEGABYTE, 1 / 2.3))  # time / bf16 F.linear padded
CPU_BYTES = 128 * MEGABYTE  # of fp32 weights, out of cache: there int8 and int4 are asked for twice the speed of fp32


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--models", nargs="+", choices=LAYERS, metavar="MODEL", help=", ".join(LAYERS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw time against width as SVG")


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """The plans' widths by model, each with all ops and tokens; every remainder; what both come to; the figure."""
    rates = measured_rates(args.quick)
    kind = "quick" if args.quick else rates.device
    ratios: dict[str, list[float]] = {}
    points: list[Point] = []
    for index, mlp in enumerate(_typical_widths(args, kind)):
        for op in args.ops:
            for tokens in TOKENS[kind]:
                peers = _peers(args, kind, first=index == 0)
                yield Task(f"{op} {mlp.case}, {tokens}", partial(_rows, op, mlp, tokens, rates, kind, peers, ratios))
    plain = ("F.linear", "F.linear padded")
    for mlp in QUICK if args.quick else every_residue(_models(args, kind)[0]):
        for op, tokens in ((op, tokens) for op in args.ops for tokens in FIGURE_TOKENS[kind]):
            measure = partial(_rows, op, mlp, tokens, rates, kind, plain, ratios, points)
            yield Task(f"{op} {mlp.case}, {tokens}, remainder", measure)
    yield Task("geometric means", lambda: _means(ratios, rates))
    if args.figure is not None:
        yield Task("figure", lambda: _figure(args.figure, points))


def _models(args: argparse.Namespace, kind: str) -> list[str]:
    return args.models or (list(LAYERS) if kind == "cuda" else list(LAYERS)[:1])


def _typical_widths(args: argparse.Namespace, kind: str) -> list[Mlp]:
    if args.quick:
        return QUICK[:1]
    return [
        typical(model, ratio) for model in _models(args, kind) for ratio in (RATIOS if kind == "cuda" else RATIOS[:1])
    ]


def _peers(args: argparse.Namespace, kind: str, first: bool) -> tuple[str, ...]:
    """Compiling takes longer than all the rest: of the first width only, unless it is asked for."""
    if args.peers:
        return tuple(args.peers)
    left_out = {"compiled"} if kind != "cuda" or not first else set()
    return tuple(name for name in PEERS if name not in left_out)


def _rows(
    op: str, mlp: Mlp, tokens: int, rates: Rates, kind: str, peers: tuple[str, ...], ratios: dict[str, list[float]],
    points: list[Point] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Of one op, for every way its weight can be stored; ``points`` are what is drawn, of 16 bits alone."""
    for bits in (16, 8, 4) if points is None else (16,):
        product = Product(op, mlp, tokens, bits)
        size = product.weights * rates.dtype.itemsize
        generator = torch.Generator(rates.device).manual_seed(0)
        sets = [Operands(product, rates, generator) for _ in range(max(2, min(8, -(-ROTATED_BYTES // size))))]
        variants, notes = variants_of(product, sets, peers)
        for note in notes:
            say_once(f"not measured: {note}")
        seconds = interleave(variants, REPEATS[kind], len(sets), rates.device)
        if points is not None:
            points += [Point(op, tokens, mlp.width, name, value) for name, value in seconds.items()]
        yield from rows_of(product, rates, seconds, ratios)


@cache
def say_once(note: str) -> None:
    print(note)


def rows_of(product: Product, rates: Rates, seconds: dict[str, float], ratios: dict[str, list[float]]) -> Iterator[Row]:
    """Time against every peer, rates and share of the roofline, from seconds by variant; adds to ``ratios``."""
    mine, case = seconds["ours"], product.case
    size = product.read_bytes(rates.dtype.itemsize)
    reading = product.tokens <= DECODE
    yield (
        Row.single(f"{case}, reading", size / mine / 1e9, "GB/s")
        if reading
        else Row.single(f"{case}, arithmetic", product.flops / mine / 1e12, "TFLOP/s")
    )
    share = rates.floor(product.flops, size) / mine
    yield Row.single(f"{case}, share of roofline", share, "share", _asked_share(product, rates))
    for peer in PEERS:
        if peer in seconds:
            yield Row.compare(f"{case} / {peer}", mine * 1e6, seconds[peer] * 1e6, "us", _asked(product, rates, peer))
            if product.bits == 16 and (peer != "F.linear" or product.mlp.width % 2):
                phase = "decode" if reading else "prefill"
                ratios.setdefault(f"{product.op}, {phase} / {peer}", []).append(mine / seconds[peer])


def _asked_share(product: Product, rates: Rates) -> str:
    if rates.device != "cuda" or product.bits != 16 or product.tokens != 1 or product.op == "gated_mlp":
        return ""
    size = product.read_bytes(rates.dtype.itemsize)
    return next((asked for least, asked in READING if size >= least), "")


def _asked(product: Product, rates: Rates, peer: str) -> str:
    """The bound on ours / peer, where one is asked for."""
    limit, dense = None, product.weights * rates.dtype.itemsize
    if rates.device == "cpu":
        if product.bits != 16 and product.tokens == 1 and peer == "F.linear" and dense >= CPU_BYTES:
            limit = 0.5
    elif product.bits == 4 and product.tokens == 1 and peer == "F.linear padded":
        limit = next((most for least, most in INT4 if dense >= least), None)
    elif product.bits == 16 and peer == "F.linear padded" and product.tokens >= PREFILL:
        limit = 1 / 0.98
    elif product.bits == 16 and peer == "Liger" and product.tokens <= DECODE:
        limit = 1 / 1.1
    return "" if limit is None else f"<= {limit:.3f}"


def _means(ratios: dict[str, list[float]], rates: Rates) -> Iterator[Row]:
    """Geometric means of ours / peer over all widths and tokens; against F.linear over the odd widths."""
    for name, found in ratios.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        asked = "<= 0.667" if rates.device == "cuda" and name.endswith("/ F.linear") else ""
        yield Row.single(f"geometric mean of {len(found)}: {name}", mean, "ratio", asked)


def _figure(path: Path, points: list[Point]) -> list[Row]:
    write_whole(path, draw(points))
    return []


if __name__ == "__main__":
    run_tasks(__doc__ or "", tasks, options)
