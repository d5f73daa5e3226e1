"""Triton: a quantised weight whose levels a low-rank change moves, written out in one pass (see moved_levels)."""

import triton
import triton.language as tl
from torch import Tensor

from saap_kernels._launch import launching
from saap_kernels.group_quantise import LEVELS
from saap_kernels.packed import PackedWeight

BLOCK_N, WARPS = 64, 4
HALF = 32  # columns that share a group, and half of an int4 block


@triton.jit
def _written(
    quantised, scale, zero, up, down, result, rows, column, k, K, N, rank, low, high, pitch, VALUES: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Writes ``HALF`` columns from k on of some rows: scale * Q' + zero, or Q'; zeros beyond N and K."""
    moved = tl.zeros(quantised.shape, tl.float32)  # [BLOCK_N, HALF]
    inside = k + column < K
    for r in range(rank):
        factor = tl.load(up + rows * rank + r, mask=rows < N, other=0.0)
        moved += factor[:, None] * tl.load(down + r * K + k + column, mask=inside, other=0.0)[None, :]
    steps = tl.where(scale > 0, scale, 1.0)  # a group of one value has no steps
    moved = tl.where((scale > 0)[:, None], moved / steps[:, None], 0.0)
    level = tl.minimum(tl.maximum(quantised.to(tl.float32) + moved, low), high)
    level = (level + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest whole number, halves to the even one
    if VALUES:
        level = tl.fma(level, scale[:, None], zero[:, None])
    kept = (rows < N)[:, None] & inside[None, :]
    tl.store(
        result + rows[:, None] * pitch + k + column[None, :], tl.where(kept, level, 0.0).to(result.dtype.element_ty)
    )


@triton.jit
def moved_kernel(
    data, scales, zeros, up, down, result, N, K, groups, data_pitch, rank, low, high, pitch, BITS: tl.constexpr,
    GROUP: tl.constexpr, VALUES: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N], all of them stored ones
    block, column = tl.program_id(1), tl.arange(0, HALF)
    for half in tl.static_range(2):
        k = block * 2 * HALF + half * HALF
        if BITS == 8:
            quantised = tl.load(data + rows[:, None] * data_pitch + k + column[None, :])
        else:
            quantised = tl.load(data + rows[:, None] * data_pitch + block * HALF + column[None, :])
            quantised = (quantised & 15) if half == 0 else (quantised >> 4)
        at = rows * groups + tl.minimum(k // GROUP, groups - 1)
        scale, zero = tl.load(scales + at).to(tl.float32), tl.load(zeros + at).to(tl.float32)
        _written(quantised, scale, zero, up, down, result, rows, column, k, K, N, rank, low, high, pitch, VALUES, HALF)


def moved(packed: PackedWeight, up: Tensor | None, down: Tensor | None, values: bool, result: Tensor) -> Tensor:
    """``result`` (N', K rounded up to 64), contiguous: values, or levels, of ``packed`` (N, K); zero beyond N and K.

    ``up`` (N, r) and ``down`` (r, K) fp32, or None for no change.
    """
    scale, zero, group = packed.scale, packed.zero, packed.group_size
    assert scale is not None and zero is not None and group is not None
    steps, lowest = LEVELS[packed.bits]
    with launching("moved_kernel", packed.data.device):
        grid = (result.shape[0] // BLOCK_N, result.shape[1] // (2 * HALF))
        moved_kernel[grid](
            packed.data, scale, zero, scale if up is None else up.contiguous(),
            scale if down is None else down.contiguous(), result, packed.rows, packed.columns, scale.shape[1],
            packed.data.shape[1], 0 if down is None else len(down), float(lowest), float(lowest + steps),
            result.shape[1], BITS=packed.bits, GROUP=group, VALUES=values, BLOCK_N=BLOCK_N, HALF=HALF,
            num_warps=WARPS,
        )  # fmt: skip
    return result
