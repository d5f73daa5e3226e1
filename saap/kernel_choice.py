"""Whether our kernels are faster than the library's, measured once per shape in the dtype and on the device at hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

from saap_kernels import PackedWeight, gated_mlp, linear, pack
from saap_kernels.packed import LINE, round_up

CACHES = 1 << 26  # bytes of weights read in turn, so that none is found in a cache
ROWS_OF = 1 << 22  # weights: of larger matrices so many rows are timed, and the time is scaled up
REPEATS, LEAST_REPEATS, ENOUGH_SECONDS = 7, 2, 0.2  # of each; slow products are repeated less often
MARGIN = 0.9  # of the library's time; closer is noise, or little gained


@dataclass(frozen=True)
class Timing:
    """Seconds of one product of one shape: the library's on the plain weight, ours on the packed one."""

    library: float
    kernel: float

    @property
    def faster(self) -> bool:
        """Whether ours clearly is."""
        return self.kernel < MARGIN * self.library


def faster_with_kernel(
    shape: tuple[int, ...], bits: int | None, dtype: torch.dtype, device: torch.device, tokens: int = 1
) -> bool:
    """Whether ours is faster for a Linear (N, K) or a gated MLP (F, K, D); ``bits`` 8, 4 or None for ``dtype``.

    Measured at the first call for a shape, its sizes rounded up to the whole lines that are stored (some tenths of a
    second), and remembered in this process.
    """
    return timing(shape, bits, dtype, device, tokens).faster


def timing(
    shape: tuple[int, ...], bits: int | None, dtype: torch.dtype, device: torch.device, tokens: int = 1
) -> Timing:
    """The measurement behind ``faster_with_kernel``: medians of alternating runs over weights that are in no cache."""
    stored = tuple(round_up(size, LINE) for size in shape)
    return _timing(stored, bits, dtype, str(device), tokens, torch.get_num_threads())


@cache
def _timing(
    shape: tuple[int, ...], bits: int | None, dtype: torch.dtype, device: str, tokens: int, threads: int
) -> Timing:
    rows = min(shape[0], max(1, ROWS_OF // shape[1]))
    with torch.inference_mode(False), torch.no_grad():
        x = _uniform(tokens, shape[1], dtype, torch.device(device))
        calls = _linears(x, rows, bits) if len(shape) == 2 else _gated(x, rows, shape[2], bits)
        seconds = _interleaved(calls, torch.device(device))
    return Timing(*(value * shape[0] / rows for value in seconds))


def _linears(x: Tensor, rows: int, bits: int | None) -> list[list[Callable[[], object]]]:
    """Calls of the library and of ours, each over as many weights as fill the caches."""
    weight = _uniform(rows, x.shape[1], x.dtype, x.device)
    packed = pack(weight, bits=bits or 16)
    return [
        [lambda w=w: F.linear(x, w) for w in _copies(weight)],  # type: ignore[misc]  # one call per weight
        [lambda p=p: linear(x, p) for p in _packed_copies(packed)],  # type: ignore[misc]
    ]


def _gated(x: Tensor, width: int, out: int, bits: int | None) -> list[list[Callable[[], object]]]:
    sizes = (2 * width, x.shape[1]), (out, width)
    gate_up, down = (_uniform(*size, x.dtype, x.device) for size in sizes)
    pairs = list(zip(_copies(gate_up), _copies(down), strict=False))
    packed = pack(gate_up.unflatten(0, (2, width)), bits=bits or 16), pack(down, bits=bits or 16)
    packed_pairs = list(zip(*map(_packed_copies, packed), strict=False))

    def library(gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    return [
        [lambda pair=pair: library(*pair) for pair in pairs],  # type: ignore[misc]  # one call per weight
        [lambda pair=pair: gated_mlp(x, *pair, activation="silu") for pair in packed_pairs],  # type: ignore[misc]
    ]


def _uniform(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(rows, columns, device=device, dtype=dtype).uniform_(-0.05, 0.05, generator=generator)


def _copies(weight: Tensor) -> list[Tensor]:
    return [weight.clone() for _ in range(max(1, min(64, CACHES // max(1, weight.nbytes))))]


def _packed_copies(packed: PackedWeight) -> list[PackedWeight]:
    count = max(1, min(64, CACHES // packed.nbytes))
    parts = (packed.scale, packed.zero)
    return [
        PackedWeight(packed.data.clone(), packed.shape, packed.bits, packed.group_size, *parts) for _ in range(count)
    ]


def _interleaved(calls: list[list[Callable[[], object]]], device: torch.device) -> list[float]:
    """Median seconds of one call of each list, whose runs alternate; the first run of each is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    begin = perf_counter()
    for repeat in range(REPEATS + 1):
        if repeat > LEAST_REPEATS and perf_counter() - begin > ENOUGH_SECONDS:
            break
        for own, found in zip(calls, seconds, strict=True):
            _finish(device)
            start = perf_counter()
            for call in own:
                call()
            _finish(device)
            if repeat:
                found.append((perf_counter() - start) / len(own))
    return [median(found) for found in seconds]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
