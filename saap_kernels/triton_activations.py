"""Triton: sums over tokens of x * dx, x, x^2, |x| and max |x|, each operand read once.

Two ordered stages, no atomics: a program sums one token block of one feature block into
partial[quantity, block, K]; the second kernel adds the blocks of each sequence in order.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from saap_kernels._launch import launching
from saap_kernels.planes import PLANES, Planes

BLOCK_K, BLOCK_T, WARPS = 128, 8, 4  # a warp reads 16 bytes per thread: 8 features of 16 bits
FINISH_K = 128


@triton.jit
def activation_sums_kernel(
    x, dx, shift, blocks, partial, K, x_pitch, dx_pitch, plane,
    SALIENCE: tl.constexpr, SUM: tl.constexpr, SQUARE: tl.constexpr,  # plane of partial, or -1
    ABSMAX: tl.constexpr, ABS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    first, count = tl.load(blocks + 5 * block), tl.load(blocks + 5 * block + 1)
    features = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    valid = features < K
    salience = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    square = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    largest = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    absolute = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    if SHIFTED:
        about = tl.load(shift + features, mask=valid, other=0.0).to(tl.float32)
    for start in range(0, count, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        mask = (rows < count)[:, None] & valid[None, :]
        row = (first + rows).to(tl.int64)[:, None]
        values = tl.load(x + row * x_pitch + features[None, :], mask=mask, other=0.0).to(tl.float32)
        if SALIENCE >= 0:
            gradient = tl.load(dx + row * dx_pitch + features[None, :], mask=mask, other=0.0).to(tl.float32)
            salience += values * gradient
        if ABSMAX >= 0:
            largest = tl.maximum(largest, tl.abs(values))
        if ABS >= 0:
            absolute += tl.abs(values)
        if SHIFTED:
            values = tl.where(mask, values - about[None, :], 0.0)
        if SUM >= 0:
            total += values
        if SQUARE >= 0:
            square += values * values
    out = partial + block.to(tl.int64) * K + features
    if SALIENCE >= 0:
        tl.store(out + SALIENCE * plane, tl.sum(salience, 0), mask=valid)
    if SUM >= 0:
        tl.store(out + SUM * plane, tl.sum(total, 0), mask=valid)
    if SQUARE >= 0:
        tl.store(out + SQUARE * plane, tl.sum(square, 0), mask=valid)
    if ABSMAX >= 0:
        tl.store(out + ABSMAX * plane, tl.max(largest, 0), mask=valid)
    if ABS >= 0:
        tl.store(out + ABS * plane, tl.sum(absolute, 0), mask=valid)


@triton.jit
def sequence_sums_kernel(partial, starts, result, K, plane, sequences, ABSMAX: tl.constexpr, BLOCK_K: tl.constexpr):
    features = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    sequence, quantity = tl.program_id(1), tl.program_id(2)
    valid = features < K
    value = tl.zeros((BLOCK_K,), tl.float32)
    first, stop = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    terms = partial + quantity.to(tl.int64) * plane + first.to(tl.int64) * K + features
    for _ in range(first, stop):
        term = tl.load(terms, mask=valid, other=0.0)
        value = tl.where(quantity == ABSMAX, tl.maximum(value, term), value + term)
        terms += K
    tl.store(result + (quantity * sequences + sequence).to(tl.int64) * K + features, value, mask=valid)


def sums(x: Tensor, dx: Tensor | None, spans: Tensor, shift: Tensor | None, want: Sequence[str]) -> Tensor:
    """(len(planes), S, K) fp32, planes: the salience x * dx if ``dx`` is given, then ``want``."""
    features, sequences = x.shape[1], len(spans)
    with launching("activation_sums_kernel", x.device):
        planes = Planes.of(x, dx, spans, want)
        about = None if shift is None else shift.float().contiguous()
        partial, count, slots = planes.partial, planes.count, dict(zip(PLANES, planes.slots, strict=True))
        activation_sums_kernel[(-(-features // BLOCK_K), count)](
            x, x if dx is None else dx, x if about is None else about, planes.blocks, partial, features,
            x.stride(0), x.stride(0) if dx is None else dx.stride(0), count * features,
            SALIENCE=slots["salience"], SUM=slots["sum"], SQUARE=slots["square"], ABSMAX=slots["absmax"],
            ABS=slots["abs"], SHIFTED=about is not None, BLOCK_K=BLOCK_K, BLOCK_T=BLOCK_T, num_warps=WARPS,
        )  # fmt: skip
        if planes.result is not partial:
            sequence_sums_kernel[(-(-features // FINISH_K), sequences, len(partial))](
                partial, planes.starts, planes.result, features, count * features, sequences,
                ABSMAX=slots["absmax"], BLOCK_K=FINISH_K, num_warps=WARPS,
            )  # fmt: skip
    return planes.result
