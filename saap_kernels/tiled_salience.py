"""What the tiled GPU kernels of weight_salience and coupled_salience share: operands, launches, final sums.

Such a kernel sees P (T, lines), the operand on the units' side, and Q (T, entries), the other one, and
writes partial[want, sequence, tile of entries, line]; here the tiles and the lines of a unit are added in order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saap_kernels import reference
from saap_kernels.schedule import Spans, as_spans

PARTIAL_BYTES = 32 << 20  # partial sums of one launch, where half of w is less; more sequences take more launches
VECTOR = 8  # extents and pitches of P and Q are multiples of it: 16-byte copies, also where they must be provable
ADDITIVE, COUPLED = ("abs", "square", "mixed"), ("first", "second", "mixed")


@dataclass(frozen=True)
class Operands:
    """P and Q by axis, padded to VECTOR, and how w is read along them."""

    p: Tensor  # (T, lines rounded up to VECTOR)
    q: Tensor  # (T, entries rounded up to VECTOR)
    w: Tensor
    lines: int
    entries: int
    w_stride_u: int
    w_stride_r: int

    @classmethod
    def of(cls, x: Tensor, dy: Tensor, w: Tensor, axis: str) -> "Operands":
        rows, columns = w.shape
        if axis == "out":
            return cls(_aligned(dy), _aligned(x), w, rows, columns, w.stride(0), 1)
        return cls(_aligned(x), _aligned(dy), w, columns, rows, 1, w.stride(0))


def _aligned(operand: Tensor) -> Tensor:
    """``operand``, or a copy whose extent is a multiple of VECTOR, zero-padded, with 16-byte rows."""
    extent = operand.shape[1]
    if extent % VECTOR == 0 and operand.stride(0) % VECTOR == 0 and operand.data_ptr() % 16 == 0:
        return operand
    return torch.nn.functional.pad(operand, (0, -extent % VECTOR)).contiguous()


# (ranges of one launch, plane of each of three names or -1) -> partial (planes, sequences or 1, tiles, lines) fp32
Launch = Callable[[Spans, list[int]], Tensor]


def weight_salience(
    launch: Launch, operands: Operands, tiles: int, dy: Tensor, spans: Tensor, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """(len(want), S, U) fp32, by as many launches as ``partial_bytes`` asks for; ``tiles`` of entries each."""
    step = max(1, partial_bytes(operands.w) // (len(want) * operands.lines * tiles * 4))
    ranges, slots = as_spans(spans), _slots(want, ADDITIVE)
    factors = _factors(want, ADDITIVE, scale)
    parts = []
    for start in range(0, len(ranges), step):
        partial = launch(ranges[start : start + step], slots)
        sums = partial.unflatten(-1, (-1, unit_size)).sum((2, 4))  # [want, s, U]
        parts.append(_scaled(sums, factors))
    result = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if bias is not None:
        result += reference.bias_salience(dy, bias, spans, unit_size, want, scale)
    return result


def partial_bytes(w: Tensor) -> int:
    """Memory for the partial sums of one launch: half of w at most, or a little where w is small.

    Every launch reads w again. A sequence of Qwen2.5-72B's largest weight (29568 x 8192, 462 MiB) takes 11 MiB:
    21 sequences share one read, and 10 of 64 tokens take one launch.
    """
    return max(PARTIAL_BYTES, w.numel() * w.element_size() // 2)


def coupled_salience(
    launch: Launch, dy: Tensor, spans: Tensor, unit_size: int, bias: Tensor | None, want: list[str], scale: float
) -> Tensor:
    """(len(want), U) fp32, by one launch."""
    partial = launch(as_spans(spans), _slots(want, COUPLED))
    factors = [factor / len(spans) for factor in _factors(want, COUPLED, scale)]
    result = _scaled(partial.unflatten(-1, (-1, unit_size)).sum((1, 2, 4)), factors)
    if bias is not None:
        result += reference.coupled_bias_salience(dy, bias, spans, unit_size, want, scale)
    return result


def _slots(want: Sequence[str], names: Sequence[str]) -> list[int]:
    return [want.index(name) if name in want else -1 for name in names]


def _factors(want: Sequence[str], names: Sequence[str], scale: float) -> list[float]:
    """What turns sums over t = s / scale into sums over s; "mixed" has the inner scale already."""
    return [scale * scale if name == names[1] else abs(scale) for name in want]


def _scaled(sums: Tensor, factors: list[float]) -> Tensor:
    """Each plane times its factor, in place: no tensor comes from the host, so graphs can capture it."""
    for plane, factor in zip(sums, factors, strict=True):
        if factor != 1.0:
            plane.mul_(factor)
    return sums
