"""Triton: products of tokens with tiles of a packed weight, which both inference kernels are built on.

Packed data has no edge: rows and pitch are padded, so its loads are wide and unmasked whatever N and K are. Tokens are
masked along K in one last step only, and only there read element by element. Tensor cores do the products for one
token too: the weight goes from memory to them through shared memory, with no thread waiting for it in registers.
"""

import triton
import triton.language as tl


def halves(exponent: str) -> str:
    """PTX that makes of four bytes twice four 16-bit numbers, two to a register, in the mantissa of a power of two.

    Conversions of integers are several times slower, and int4 expands two weights for every byte that is read.
    """
    return f"""{{
        .reg .b32 low, high;
        and.b32 low, $4, 0x0f0f0f0f;
        prmt.b32 $0, low, {exponent}, 0x4140;
        prmt.b32 $1, low, {exponent}, 0x4342;
        shr.u32 high, $4, 4;
        and.b32 high, high, 0x0f0f0f0f;
        prmt.b32 $2, high, {exponent}, 0x4140;
        prmt.b32 $3, high, {exponent}, 0x4342;
    }}"""


HALVES_BF16 = tl.constexpr(halves("0x43434343"))  # 128 + Q
HALVES_FP16 = tl.constexpr(halves("0x64646464"))  # 1024 + Q
ASSEMBLES = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def tile_of(tiles_n, tiles_t, HEIGHT: tl.constexpr):
    """(row tile, token tile) of this program: neighbours share rows of tiles, so that both operands stay in L2."""
    tile = tl.program_id(0)
    group = tile // (HEIGHT * tiles_t)
    height = min(tiles_n - group * HEIGHT, HEIGHT)
    inside = tile % (HEIGHT * tiles_t)
    return group * HEIGHT + inside % height, inside // height


@triton.jit
def _scales(scales, zeros, at, k, groups, GROUP: tl.constexpr):
    """Scale and zero of each row at column k; past the last group, where only zeros are multiplied, the last one's."""
    index = tl.minimum(k // GROUP, groups - 1)
    return tl.load(scales + at + index), tl.load(zeros + at + index)


@triton.jit
def _halves(packed, dtype: tl.constexpr):
    """The low and the high four bits of each byte, 0 to 15, in ``dtype``."""
    if ASSEMBLES and dtype.primitive_bitwidth == 16:
        code: tl.constexpr = HALVES_BF16 if dtype == tl.bfloat16 else HALVES_FP16
        offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        low, high = tl.inline_asm_elementwise(
            code, "=r,=r,=r,=r,r", [packed], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
        )
        low, high = low.to(dtype, bitcast=True) - offset, high.to(dtype, bitcast=True) - offset
    else:
        low, high = (packed & 15).to(dtype), (packed >> 4).to(dtype)
    return low, high


@triton.jit
def _expanded(quantised, scale, zero, dtype: tl.constexpr):
    """scale * Q + zero, rounded once to ``dtype``, in which Q is exact."""
    scale, zero = tl.broadcast_to(scale[:, None], quantised.shape), tl.broadcast_to(zero[:, None], quantised.shape)
    if scale.dtype == dtype:
        values = tl.fma(quantised.to(dtype), scale, zero)
    else:
        values = tl.fma(quantised.to(tl.float32), scale.to(tl.float32), zero.to(tl.float32))
    return values.to(dtype)


@triton.jit
def _multiply(
    acc, data, inside, scale, zero, scales, zeros, at, k, groups, x, x_high, BITS: tl.constexpr, GROUP: tl.constexpr,
    EDGE: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x (tile at the pointers ``data``)'; int4 multiplies the low halves by ``x`` and the high by ``x_high``."""
    # a weight that is read once must not displace the tokens, which every program reads
    policy: tl.constexpr = "evict_first" if STREAM else ""
    if EDGE:
        tile = tl.load(data, mask=inside, other=0.0, eviction_policy=policy)  # [BLOCK_N, columns]
    else:
        tile = tl.load(data, eviction_policy=policy)
    if BITS == 16:
        acc = tl.dot(x, tile.to(x.dtype).T, acc, input_precision=PRECISION)
    elif BITS == 8:
        acc = tl.dot(x, _expanded(tile, scale, zero, x.dtype).T, acc, input_precision=PRECISION)
    else:
        low, high = _halves(tile, x.dtype)
        acc = tl.dot(x, _expanded(low, scale, zero, x.dtype).T, acc, input_precision=PRECISION)
        if GROUP % 64 != 0:  # the halves of a block may belong to two groups
            scale, zero = _scales(scales, zeros, at, k + 32, groups, GROUP)
        acc = tl.dot(x_high, _expanded(high, scale, zero, x.dtype).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tokens(x, present, columns, K, MASKED: tl.constexpr):
    """x at ``columns``, [BLOCK_T, columns], zero beyond T and K."""
    mask = present[:, None]
    if MASKED:
        mask = mask & (columns < K)[None, :]
    return tl.load(x[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _step(
    acc, acc_up, x, present, data, plane, pitch, scale, zero, scale_up, zero_up, scales, zeros, at, at_up, k, K, groups,
    BITS: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr, STREAM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both accumulators after columns k to k + BLOCK_K; x is loaded once for the two."""
    if BITS == 4:
        byte = tl.arange(0, BLOCK_K // 2)
        columns = k + byte // 32 * 64 + byte % 32
        data += (k // 2 + byte)[None, :]
        x_high = _tokens(x, present, columns + 32, K, MASKED)
    else:
        columns = k + tl.arange(0, BLOCK_K)
        data += columns[None, :]
        x_high = 0
    x_tile = _tokens(x, present, columns, K, MASKED)
    # a pitch of 16-bit weights may end within a step, at a multiple of 64: the mask leaves these loads wide
    inside = (columns < pitch)[None, :]
    edge: tl.constexpr = MASKED and BITS == 16 and BLOCK_K > 64
    acc = _multiply(
        acc, data, inside, scale, zero, scales, zeros, at, k, groups, x_tile, x_high,
        BITS, GROUP, edge, STREAM, PRECISION,
    )  # fmt: skip
    if GATED:
        acc_up = _multiply(
            acc_up, data + plane, inside, scale_up, zero_up, scales, zeros, at_up, k, groups, x_tile, x_high,
            BITS, GROUP, edge, STREAM, PRECISION,
        )  # fmt: skip
    return acc, acc_up


@triton.jit
def products(
    x, data, scales, zeros, token, row, first, stop, T, K, x_pitch, rows, pitch, groups,
    BITS: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, STREAM: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x w' [BLOCK_T, BLOCK_N] in fp32 over steps ``first`` to ``stop`` of BLOCK_K columns, of gate and of up if GATED.

    ``rows``: N', by which gate and up are apart; ``pitch`` in elements of ``data``; a step lies within one group.
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
        scale, zero = _scales(scales, zeros, at, first * BLOCK_K, groups, GROUP)  # [BLOCK_N]
        if GATED:
            scale_up, zero_up = _scales(scales, zeros, at_up, first * BLOCK_K, groups, GROUP)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for step in range(first, tl.minimum(stop, K // BLOCK_K)):
        k = step * BLOCK_K
        acc, acc_up = _step(
            acc, acc_up, x, present, data, plane, pitch, scale, zero, scale_up, zero_up, scales, zeros, at, at_up,
            k, K, groups, BITS, GATED, GROUP, False, STREAM, precision, BLOCK_K,
        )  # fmt: skip
        if BITS != 16:  # read one step ahead: loads as narrow as these are not pipelined
            scale, zero = _scales(scales, zeros, at, k + BLOCK_K, groups, GROUP)
            if GATED:
                scale_up, zero_up = _scales(scales, zeros, at_up, k + BLOCK_K, groups, GROUP)
    if (first < stop) & (stop * BLOCK_K > K):
        acc, acc_up = _step(
            acc, acc_up, x, present, data, plane, pitch, scale, zero, scale_up, zero_up, scales, zeros, at, at_up,
            (stop - 1) * BLOCK_K, K, groups, BITS, GATED, GROUP, True, STREAM, precision, BLOCK_K,
        )  # fmt: skip
    return acc, acc_up
