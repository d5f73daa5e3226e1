"""Whether our kernels are faster than the library's, measured once per shape in the dtype and on the device at hand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from saap_kernels import PackedWeight, gated_mlp, linear, pack, switch_points
from saap_kernels.backend import requested
from saap_kernels.packed import LINE, round_up
from saap_kernels.switch_points.measure import interleaved

CACHES = 1 << 26  # bytes of weights read in turn, so that none is found in a cache
ROWS_OF = 1 << 22  # weights: of larger matrices so many rows are timed, and the time is scaled up
REPEATS = 7  # of each copy; slow products are repeated less often
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


def timing(
    shape: tuple[int, ...], bits: int | None, dtype: torch.dtype, device: torch.device, tokens: int = 1
) -> Timing:
    """Of a Linear (N, K) or a gated MLP (F, K, D), ``bits`` 8, 4 or None for ``dtype``, over weights in no cache.

    Measured at the first call for a shape, its sizes rounded up to the whole lines that are stored (some tenths of a
    second), and remembered in this process for as long as the ops choose their paths as they did.
    """
    stored = tuple(round_up(size, LINE) for size in shape)
    paths = requested(), tuple(switch_points.measured(device).items())
    return _timing(stored, bits, dtype, str(device), tokens, torch.get_num_threads(), paths)


@cache
def _timing(
    shape: tuple[int, ...], bits: int | None, dtype: torch.dtype, device: str, tokens: int, threads: int, paths: object
) -> Timing:
    rows = min(shape[0], max(LINE, ROWS_OF // shape[1] // LINE * LINE))
    with torch.inference_mode(False), torch.no_grad():
        x = _uniform(tokens, shape[1], dtype, torch.device(device))
        library, kernel = _linears(x, rows, bits) if len(shape) == 2 else _gated(x, rows, shape[2], bits)
        calls = {"library": partial(_turn, library), "kernel": partial(_turn, kernel)}
        copies = max(len(library), len(kernel))
        # the fastest: what other work on the machine adds to a call is no property of a product
        seconds = interleaved(calls, copies, torch.device(device), REPEATS * copies, min)
    return Timing(**{name: value * shape[0] / rows for name, value in seconds.items()})


def _turn(calls: list[Callable[[], object]], index: int) -> object:
    return calls[index % len(calls)]()


def _linears(x: Tensor, rows: int, bits: int | None) -> list[list[Callable[[], object]]]:
    """Calls of the library and of ours, each over as many weights as fill the caches."""
    weights, packed = _weights(x, rows, x.shape[1], bits)
    return [
        [lambda w=w: F.linear(x, w) for w in weights],  # type: ignore[misc]  # one call per weight
        [lambda p=p: linear(x, p) for p in packed],  # type: ignore[misc]
    ]


def _gated(x: Tensor, width: int, out: int, bits: int | None) -> list[list[Callable[[], object]]]:
    """As ``_linears``, of a gated MLP."""
    gate_up, down = _weights(x, width, x.shape[1], bits, pair=True), _weights(x, out, width, bits)

    def library(gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = gate_up
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    pairs, packed = (list(zip(gate_up[i], down[i], strict=False)) for i in range(2))
    return [
        [lambda pair=pair: library(*pair) for pair in pairs],  # type: ignore[misc]  # one call per weight
        [lambda pair=pair: gated_mlp(x, *pair, activation="silu") for pair in packed],  # type: ignore[misc]
    ]


def _uniform(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(rows, columns, device=device, dtype=dtype).uniform_(-0.05, 0.05, generator=generator)


def _weights(
    x: Tensor, rows: int, columns: int, bits: int | None, pair: bool = False
) -> tuple[list[Tensor], list[PackedWeight]]:
    """Weights (rows, columns), or (2, rows, columns) of a ``pair``, plain and packed: some rows again and again."""
    line = _uniform(LINE, columns, x.dtype, x.device)
    line = torch.stack([line, line]) if pair else line
    packed = pack(line, bits=bits or 16)

    def repeated(tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * (rows // LINE), -2)

    scale, zero = (None if each is None else repeated(each) for each in (packed.scale, packed.zero))
    whole = replace(packed, shape=(*packed.shape[:-2], rows, columns), scale=scale, zero=zero)
    return _copies(repeated(line)), [replace(whole, data=each) for each in _copies(repeated(packed.data))]


def _copies(tensor: Tensor) -> list[Tensor]:
    return [tensor.clone() for _ in range(max(1, min(64, CACHES // tensor.nbytes)))]
