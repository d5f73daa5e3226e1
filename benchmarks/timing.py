"""Interleaved timing of variants: rotated operands past the caches, medians, GPU graphs for short calls."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from benchmarks.common import highest_resident, peak_of_device

Variant = Callable[[int], object]  # takes the index of the operand set to use


def interleave(variants: Mapping[str, Variant], repeats: int, sets: int, device: str) -> dict[str, float]:
    """{name: median seconds of one call}; each repeat runs every variant once, on the next operand set.

    CPU: wall clock. CUDA: events around one call (a captured graph where the variant can be captured),
    with enough work queued in front that launch costs do not show.
    """
    calls = {name: _captured(call, sets) if device == "cuda" else call for name, call in variants.items()}
    for call in calls.values():
        for index in range(sets):
            call(index)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            seconds[name].append(_time(call, repeat % sets, device))
    return {name: median(values) for name, values in seconds.items()}


def peaks(variants: Mapping[str, Variant], device: str) -> dict[str, int]:
    """{name: bytes above what stood before} of one call of each variant, after ``interleave`` has warmed them up."""
    found = {}
    for name, call in variants.items():
        with peak_of_device(device) if device == "cuda" else highest_resident() as peak:
            call(0)
            found[name] = peak()
    return found


def _time(call: Variant, index: int, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        call(index)
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # about half a millisecond, in which the host enqueues everything below
    begin.record()
    call(index)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _captured(call: Variant, sets: int) -> Variant:
    """The call as one CUDA graph per operand set; the call itself where capture is refused."""
    for index in range(sets):
        call(index)  # compiles, and fills caches that must not be filled during capture
    torch.cuda.synchronize()
    graphs = []
    try:
        for index in range(sets):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(index)
            graphs.append(graph)
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return lambda index: graphs[index].replay()


def read_bandwidth(device: str, size: int = 1 << 28) -> float:
    """Bytes per second of summing ``size`` bytes of fp32 out of cache: the roofline of memory-bound ops."""
    data = torch.ones(size // 4, device=device)
    return size / interleave({"sum": lambda _: data.sum()}, 7, 1, device)["sum"]


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP per second of a square matmul: the roofline of compute-bound ops."""
    left = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / interleave({"mm": lambda _: left @ left}, 5, 1, device)["mm"]
