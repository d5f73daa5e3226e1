"""Triton: x W' + b of a packed weight; few tokens are bound by reading it, more of them by the products.

One kernel does both. Up to 16 tokens its tiles are long in K, and where they are few several programs share the K of
one, whose fp32 sums a second kernel adds in order. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saap_kernels import triton_gated
from saap_kernels._launch import launching
from saap_kernels.packed import PackedWeight
from saap_kernels.triton_config import FINISH_N, LinearConfig, Operands, choose_config
from saap_kernels.triton_packed import products, tile_of

gated_linear = triton_gated.gated_linear


@triton.jit(do_not_specialize=["T", "N_units", "K", "x_units", "groups", "steps"])
def linear_kernel(
    x, data, scales, zeros, bias, out, T, N_units, K, x_units, rows, pitch, groups, steps,
    BITS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, STREAM: tl.constexpr,
    EXACT: tl.constexpr, N_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N = N_units * N_UNIT
    tile_n, tile_t = tile_of(tl.cdiv(rows, BLOCK_N), tl.cdiv(T, BLOCK_T), 8)
    split = tl.program_id(1)
    first = split * steps
    acc, _ = products(
        x, data, scales, zeros, tile_t * BLOCK_T, tile_n * BLOCK_N,
        first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K)), T, K, x_units.to(tl.int64) * X_UNIT, rows, pitch, groups,
        BITS, False, GROUP, STREAM, EXACT, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    n, t = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :], (tile_t * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    if SPLIT:  # partial (S, T, N')
        at = (split.to(tl.int64) * T + t) * rows + n
        tl.store(out + at, acc, mask=(t < T) & (n < rows))
    else:
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + t.to(tl.int64) * N + n, acc.to(out.dtype.element_ty), mask=(t < T) & (n < N))


@triton.jit(do_not_specialize=["N", "splits"])
def linear_finish_kernel(partial, bias, out, N, rows, splits, plane, BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    n, t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    valid = n < N
    value = tl.zeros((BLOCK_N,), tl.float32)
    at = partial + t * rows + n
    for _ in range(splits):
        value += tl.load(at, mask=n < rows, other=0.0)
        at += plane
    if BIAS:
        value += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + t * N + n, value.to(out.dtype.element_ty), mask=valid)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, config: LinearConfig | None = None) -> Tensor:
    """As ``reference_linear.linear``; x in fp16, bf16 or fp32."""
    return _linear(Operands(x, weight, weight.columns), bias, config)


def linear_of_padded(
    h: Tensor, weight: PackedWeight, bias: Tensor | None, config: LinearConfig | None = None
) -> Tensor:
    """As ``reference_linear.linear_of_padded``: the zeros beyond K are multiplied, in loads that need no edge."""
    return _linear(Operands(h, weight, h.shape[1]), bias, config)


def _linear(operands: Operands, bias: Tensor | None, config: LinearConfig | None) -> Tensor:
    x, rows, padded = operands.x, operands.weight.rows, operands.weight.data.shape[-2]
    config = config or choose_config(operands.problem(gated=False))
    tokens, split = len(x), config.splits > 1
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    to = torch.empty(config.splits, tokens, padded, dtype=torch.float32, device=x.device) if split else out
    unit = 1 if rows % 8 else 8
    bias_or_x = x if bias is None else bias.contiguous()
    with launching("linear_kernel", x.device):
        linear_kernel[operands.grid(config)](
            x, operands.weight.data, operands.scale, operands.zero, bias_or_x, to,
            tokens, rows // unit, *operands.sizes(config),
            BIAS=bias is not None, SPLIT=split, N_UNIT=unit, **operands.constants(config),
        )  # fmt: skip
        if split:
            linear_finish_kernel[(-(-rows // FINISH_N), tokens)](
                to, bias_or_x, out, rows, padded, config.splits, tokens * padded,
                BIAS=bias is not None, BLOCK_N=FINISH_N, num_warps=4,
            )  # fmt: skip
    return out
