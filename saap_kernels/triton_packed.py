"""Triton: products of tokens with tiles of a packed weight, which both inference kernels are built on.

A tile is w x', BLOCK_N rows of the weight by BLOCK_T tokens: in this order the weight is the operand that tensor cores
take from registers, so that quantised ones are expanded there, and as few as 16 tokens fill an instruction of Hopper.
The packed data has no edge: rows and pitch are padded, so its loads are wide and unmasked whatever N and K are. Tokens
are masked along K in one last step only, and only there read element by element.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(tiles_n, tiles_t, GROUP: tl.constexpr):
    """(row tile, token tile) of this program: neighbours share rows of tiles, so that both operands stay in L2."""
    tile = tl.program_id(0)
    group = tile // (GROUP * tiles_t)
    height = min(tiles_n - group * GROUP, GROUP)
    inside = tile % (GROUP * tiles_t)
    return group * GROUP + inside % height, inside // height


@triton.jit
def _scales(scale, zero, at, k, group, groups):
    """Scale and zero of each row at column k; past the last group, where only zeros are multiplied, the last one's."""
    index = tl.minimum(k // group, groups - 1)
    return tl.load(scale + at + index), tl.load(zero + at + index)


@triton.jit
def _expanded(quantised, scale, zero, dtype: tl.constexpr):
    """scale * Q + zero, rounded once to ``dtype``."""
    if scale.dtype == dtype:
        factor, shift = tl.broadcast(scale[:, None], quantised)[0], tl.broadcast(zero[:, None], quantised)[0]
        values = tl.fma(quantised.to(dtype), factor, shift)  # Q is exact in 8 bits of mantissa
    else:
        values = quantised.to(tl.float32) * scale.to(tl.float32)[:, None] + zero.to(tl.float32)[:, None]
    return values.to(dtype)


@triton.jit
def _multiply(
    acc, data, inside, scale, zero, scale_high, zero_high, x, x_high,
    BITS: tl.constexpr, EDGE: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (tile at the pointers ``data``) x'; int4 multiplies the low halves by ``x`` and the high by ``x_high``."""
    # a weight that is read once must not displace the tokens, which every program reads
    policy: tl.constexpr = "evict_first" if STREAM else ""
    if EDGE:
        tile = tl.load(data, mask=inside, other=0.0, eviction_policy=policy)  # [BLOCK_N, columns]
    else:
        tile = tl.load(data, eviction_policy=policy)
    if BITS == 16:
        acc = tl.dot(tile.to(x.dtype), x.T, acc, input_precision=PRECISION)
    elif BITS == 8:
        acc = tl.dot(_expanded(tile, scale, zero, x.dtype), x.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(_expanded(tile & 15, scale, zero, x.dtype), x.T, acc, input_precision=PRECISION)
        acc = tl.dot(_expanded(tile >> 4, scale_high, zero_high, x.dtype), x_high.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _step(
    acc, acc_up, x, present, data, plane, pitch, scale, zero, scale_up, zero_up, scales, zeros, at, at_up, k, K, group, groups,
    BITS: tl.constexpr, GATED: tl.constexpr, SPLIT_GROUPS: tl.constexpr, MASKED: tl.constexpr, STREAM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both accumulators after columns k to k + BLOCK_K; x is loaded once for the two."""
    if BITS == 4:
        byte = tl.arange(0, BLOCK_K // 2)
        columns = k + byte // 32 * 64 + byte % 32
        data += k // 2 + byte[None, :]
    else:
        columns = k + tl.arange(0, BLOCK_K)
        data += columns[None, :]
    mask = present[:, None]
    if MASKED:
        mask = mask & (columns < K)[None, :]
    x_tile = tl.load(x[:, None] + columns[None, :], mask=mask, other=0.0)  # [BLOCK_T, columns]
    x_high = x_tile
    scale_high, zero_high, scale_up_high, zero_up_high = scale, zero, scale_up, zero_up
    if BITS == 4:
        mask = present[:, None]
        if MASKED:
            mask = mask & (columns + 32 < K)[None, :]
        x_high = tl.load(x[:, None] + (columns + 32)[None, :], mask=mask, other=0.0)
        if SPLIT_GROUPS:  # a group of an odd multiple of 32: the two halves of a block may belong to two groups
            scale_high, zero_high = _scales(scales, zeros, at, k + 32, group, groups)
            if GATED:
                scale_up_high, zero_up_high = _scales(scales, zeros, at_up, k + 32, group, groups)
    # a pitch of 16-bit weights may end within a step, at a multiple of 64: the mask leaves these loads wide
    inside = (columns < pitch)[None, :]
    edge: tl.constexpr = MASKED and BITS == 16 and BLOCK_K > 64
    acc = _multiply(
        acc, data, inside, scale, zero, scale_high, zero_high, x_tile, x_high, BITS, edge, STREAM, PRECISION
    )
    if GATED:
        acc_up = _multiply(
            acc_up, data + plane, inside, scale_up, zero_up, scale_up_high, zero_up_high, x_tile, x_high,
            BITS, edge, STREAM, PRECISION,
        )  # fmt: skip
    return acc, acc_up


@triton.jit
def products(
    x, data, scales, zeros, token, row, first, stop, T, K, x_pitch, rows, pitch, groups, group,
    BITS: tl.constexpr, GATED: tl.constexpr, SPLIT_GROUPS: tl.constexpr, STREAM: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w x' [BLOCK_N, BLOCK_T] in fp32 over steps ``first`` to ``stop`` of BLOCK_K columns, of gate and of up if GATED.

    ``rows``: N', by which gate and up are apart; ``pitch`` in elements of ``data``.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    tokens = token + tl.arange(0, BLOCK_T)
    present = tokens < T
    x += tokens.to(tl.int64) * x_pitch  # [BLOCK_T]
    lines = tl.minimum(row + tl.arange(0, BLOCK_N), rows - 1).to(tl.int64)  # a tile of 128 may reach past N'
    data += (lines * pitch)[:, None]
    plane = rows.to(tl.int64) * pitch
    at, at_up = lines * groups, (lines + rows) * groups
    scale, zero, scale_up, zero_up = 0, 0, 0, 0
    if BITS != 16:
        scale, zero = _scales(scales, zeros, at, first * BLOCK_K, group, groups)  # [BLOCK_N]
        if GATED:
            scale_up, zero_up = _scales(scales, zeros, at_up, first * BLOCK_K, group, groups)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for step in range(first, tl.minimum(stop, K // BLOCK_K)):
        k = step * BLOCK_K
        acc, acc_up = _step(
            acc, acc_up, x, present, data, plane, pitch, scale, zero, scale_up, zero_up, scales, zeros, at, at_up, k, K,
            group, groups, BITS, GATED, SPLIT_GROUPS, False, STREAM, precision, BLOCK_K,
        )  # fmt: skip
        if BITS != 16:  # read one step ahead: loads as narrow as these are not pipelined
            scale, zero = _scales(scales, zeros, at, k + BLOCK_K, group, groups)
            if GATED:
                scale_up, zero_up = _scales(scales, zeros, at_up, k + BLOCK_K, group, groups)
    if stop * BLOCK_K > K:
        acc, acc_up = _step(
            acc, acc_up, x, present, data, plane, pitch, scale, zero, scale_up, zero_up, scales, zeros, at, at_up,
            (stop - 1) * BLOCK_K, K, group, groups, BITS, GATED, SPLIT_GROUPS, True, STREAM, precision, BLOCK_K,
        )  # fmt: skip
    return acc, acc_up
