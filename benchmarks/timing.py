"""Interleaved timing of variants: rotated operands past the caches, medians, GPU graphs for short calls."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.common import highest_resident, peak_of_device

GRAPH_SECONDS = 0.05  # longer calls have work queued all the time, and their graphs would hold much memory
VARIANT_SECONDS, LEAST_REPEATS = 0.3, 3  # of one variant on one shape, and how often it is run at least

Variant = Callable[[int], object]  # takes the index of the operand set to use


@dataclass(frozen=True)
class Rates:
    """Measured ceilings of the device, per second, and where they were measured."""

    flops: float
    read_bytes: float
    device: str
    dtype: torch.dtype

    def floor(self, flops: float, size: float) -> float:
        """Seconds that no kernel can go below: arithmetic or one read of everything, whichever is longer."""
        return max(flops / self.flops, size / self.read_bytes)


def interleave(variants: Mapping[str, Variant], repeats: int, sets: int, device: str) -> dict[str, float]:
    """{name: median seconds of one call}; each repeat runs every variant once, on the next operand set.

    CPU: wall clock. CUDA: events around one call (the replay of a captured graph where it is short), with enough
    work queued in front that launch costs do not show. Variants that take long are repeated less often.
    """
    if device == "cuda":
        torch.cuda.empty_cache()  # what an earlier comparison's graphs held
    calls, times = {}, {}
    for name, call in variants.items():
        calls[name], once = _warmed_up(call, sets, device)
        times[name] = min(repeats, max(LEAST_REPEATS, int(VARIANT_SECONDS / once)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            if repeat < times[name]:
                seconds[name].append(_time(call, repeat % sets, device))
    return {name: median(values) for name, values in seconds.items()}


def _warmed_up(call: Variant, sets: int, device: str) -> tuple[Variant, float]:
    """The call, captured where that pays, once it has run on every operand set; and about what it takes."""
    for index in range(sets):
        call(index)  # compiles, and fills caches that must not be filled during capture
    once = _time(call, 0, device)
    if device == "cuda" and once < GRAPH_SECONDS:
        call = _captured(call, sets)
        once = _time(call, 0, device)
    return call, once


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
    """The call as one CUDA graph per operand set, which share their memory; the call itself if it refuses capture."""
    graphs, pool = [], torch.cuda.graph_pool_handle()
    try:
        for index in range(sets):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                call(index)
            graphs.append(graph)
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return lambda index: graphs[index].replay()


def read_bandwidth(device: str, size: int = 1 << 28) -> float:
    """Bytes per second of summing ``size`` bytes of fp32 out of cache: the roofline of memory-bound ops."""
    data = torch.rand(size // 4, device=device)
    return size / interleave({"sum": lambda _: data.sum()}, 7, 1, device)["sum"]


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP per second of a square matmul: the roofline of compute-bound ops."""
    left = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / interleave({"mm": lambda _: left @ left}, 5, 1, device)["mm"]


def measured_rates(quick: bool) -> Rates:
    """The ceilings of the GPU in bf16, or of the CPU in fp32."""
    if not torch.cuda.is_available():
        rate = matmul_rate("cpu", torch.float32, 1024)
        return Rates(rate, read_bandwidth("cpu", 1 << 26 if quick else 1 << 28), "cpu", torch.float32)
    rate = matmul_rate("cuda", torch.bfloat16, 8192)
    return Rates(rate, read_bandwidth("cuda", 1 << 30), "cuda", torch.bfloat16)
