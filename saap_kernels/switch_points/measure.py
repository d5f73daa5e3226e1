"""Measuring switch points: every path that can run a product, side by side, over sizes and token counts."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import exp, log
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from saap_kernels import products
from saap_kernels.packed import PackedWeight, pack
from saap_kernels.switch_points import LIBRARY, forget, key, table
from saap_kernels.switch_points.table import Rungs

# (out, in) features of ``linear``, and the intermediate width and in features of ``gated_linear``: two of each size
# class, one of odd width as pruning leaves them
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "linear": ((1024, 4096), (4096, 1195), (4096, 4096), (3453, 4096), (4096, 8807), (11008, 4096)),
    "gated_linear": ((704, 4096), (555, 4096), (2752, 4096), (2333, 4096), (8807, 4096), (11008, 4096)),
}
TOKENS = {"cuda": (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512), "cpu": (1, 2, 4, 8, 16, 32, 64, 128)}
QUICK_TOKENS = (1, 16, 64)
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16)}  # of x
COLD_BYTES = {"cuda": 256 << 20, "cpu": 256 << 20}  # of weights between two reads of one: more than any cache keeps
MARGIN = 0.03  # a path takes over where it is so much faster: noise must not make more switches than there are
REPEATS, QUICK_REPEATS, SECONDS = 9, 3, 0.3  # of one path, and after how long fewer repeats do

Call = Callable[[int], object]  # a product with one of the copies of its weight
Times = dict[str, float]


def measure_switch_points(
    device: torch.device | str,
    *,
    quick: bool = False,
    file: Path | str | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Rungs]:
    """Measure on ``device`` ("cuda", "cuda:1" or "cpu") up to how many tokens which path is fastest, and store it.

    Every kernel that can run there and torch's GEMM are timed in turn on weights that no cache holds, on a GPU in
    CUDA graphs. The table, {kind of product: ((largest token count, path), ..., (None, path))}, replaces what
    ``file`` (None: the one named by SAAP_SWITCH_POINTS, or saap/switch_points.json in the user's cache) holds for
    this device, and is used from then on. ``quick`` takes one shape per size, fewer token counts and repeats.
    ``report`` is called with a line per kind of product. Takes minutes. Raises ValueError for a device without
    kernels and for a file that is not a table of switch points.
    """
    found = torch.device(device)
    path = table.location() if file is None else Path(file)
    if found.type not in TOKENS:
        raise ValueError(f"device: expected {' or '.join(TOKENS)}, got {device}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that this torch can use, got {device}")
    table.replaceable(path)
    points: dict[str, Rungs] = {}
    for kind, rungs in _measured(found, quick):
        points[kind] = rungs
        if report is not None:
            report(f"{kind}: " + ", ".join(f"{name} {_up_to(most)}" for most, name in rungs))
    table.write(path, table.device_name(found), points)
    forget()
    return points


def _up_to(most: int | None) -> str:
    return "above" if most is None else f"up to {most}"


def _measured(device: torch.device, quick: bool) -> Iterator[tuple[str, Rungs]]:
    """(kind of product, its rungs), for every kind that a kernel runs here."""
    for op, dtype in product(SHAPES, DTYPES[device.type]):
        kept = [(16, dtype), (8, dtype), (4, dtype)]
        if dtype == torch.float32:
            kept.append((16, torch.bfloat16))
        for bits, stored in kept:
            times: dict[str, dict[int, list[Times]]] = {}
            for shape in SHAPES[op]:
                weight = _weight(op, shape, stored, bits, device)
                kind = key(op, dtype, weight)
                if not quick or kind not in times:
                    _time_shape(op, weight, dtype, quick, times.setdefault(kind, {}))
            yield from ((kind, fastest(by_tokens)) for kind, by_tokens in times.items() if by_tokens)


def _weight(op: str, shape: tuple[int, int], dtype: torch.dtype, bits: int, device: torch.device) -> PackedWeight:
    lead = (2,) if op == "gated_linear" else ()
    values = torch.randn(*lead, *shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    return pack(values.to(device, dtype), bits=bits)


def _time_shape(op: str, weight: PackedWeight, dtype: torch.dtype, quick: bool, times: dict[int, list[Times]]) -> None:
    """Add the seconds of every path to ``times``, by token count; nothing where no kernel runs the product."""
    device = weight.data.device
    copies = [weight, *(_copy(weight) for _ in range(COLD_BYTES[device.type] // weight.nbytes))]
    for tokens in QUICK_TOKENS if quick else TOKENS[device.type]:
        x = torch.randn(tokens, weight.columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        limits = products.kernels_for(x, weight)
        names = [name for name, most in limits.items() if most is None or tokens <= most]
        if not limits:
            return
        calls = {name: partial(_run, op, name, x, copies) for name in [*names, LIBRARY]}
        found = interleaved(calls, len(copies), device, QUICK_REPEATS if quick else REPEATS)
        times.setdefault(tokens, []).append(found)


def _copy(weight: PackedWeight) -> PackedWeight:
    scale, zero = (None if each is None else each.clone() for each in (weight.scale, weight.zero))
    return PackedWeight(weight.data.clone(), weight.shape, weight.bits, weight.group_size, scale, zero)


def _run(op: str, name: str, x: Tensor, weights: Sequence[PackedWeight], index: int) -> None:
    module = products.module_of(name)
    if op == "linear":
        module.linear(x, weights[index], None)
    else:
        module.gated_linear(x, weights[index], None, "silu")


def interleaved(
    calls: Mapping[str, Call], copies: int, device: torch.device, repeats: int,
    summary: Callable[[list[float]], float] = median,
) -> Times:  # fmt: skip
    """{name: seconds of one product, the median of all}; each round runs every call, long ones in fewer rounds."""
    ready = {name: _warmed_up(call, copies, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for index in range(repeats):
        for name, call in ready.items():
            if index < 3 or sum(seconds[name]) < SECONDS:
                seconds[name].append(_time(call, index % copies, device))
    return {name: summary(values) / (copies if device.type == "cuda" else 1) for name, values in seconds.items()}


def _warmed_up(call: Call, copies: int, device: torch.device) -> Call:
    """The call, having compiled what it compiles; on a GPU a graph of it with every copy, which hides its launches."""
    call(0)
    if device.type != "cuda":
        return call
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        # torch would capture on one stream for all devices, that of the first
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            for index in range(copies):
                call(index)
    return lambda _: graph.replay()


def _time(call: Call, index: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call(index)
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call(index)
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def fastest(by_tokens: Mapping[int, Sequence[Times]]) -> Rungs:
    """Rungs from {token count: seconds of every path, per shape}: shapes count alike, whatever they take."""
    rungs: list[tuple[int | None, str]] = []
    for tokens, shapes in sorted(by_tokens.items()):
        scores = {
            name: exp(fmean(log(times[name] / times[LIBRARY]) for times in shapes))
            for name in shapes[0]
            if all(name in times for times in shapes)
        }
        best = min(scores, key=lambda name: scores[name])
        if rungs and rungs[-1][1] in scores:
            before = rungs[-1][1]
            if scores[best] > scores[before] * (1 - MARGIN):
                best = before
        if rungs and rungs[-1][1] == best:
            rungs.pop()
        rungs.append((tokens, best))
    return (*rungs[:-1], (None, rungs[-1][1])) if rungs else ()
