"""Triton: act(x Wg' + bg) * (x Wu' + bu), each tile of x read once for both products, nothing between them written.

Tiles, steps and splits are those of ``triton_linear``; activation and product are in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saap_kernels._launch import launching
from saap_kernels.packed import PackedWeight
from saap_kernels.triton_config import FINISH_N, LinearConfig, Operands, choose_config
from saap_kernels.triton_gating import gated
from saap_kernels.triton_packed import products, tile_of


@triton.jit
def _activated(gate, up, bias, f, F, BIAS: tl.constexpr, GELU: tl.constexpr):
    """Zero beyond F, whatever x holds there: an infinity times the padding of the weight is NaN."""
    if BIAS:
        gate += tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)
        up += tl.load(bias + F + f, mask=f < F, other=0.0).to(tl.float32)
    return tl.where(f < F, gated(gate, up, GELU), 0.0)


@triton.jit(do_not_specialize=["T", "F", "K", "x_units", "groups", "steps"])
def gated_kernel(
    x, data, scales, zeros, bias, out, T, F, K, x_units, rows, pitch, groups, steps,
    BITS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, GELU: tl.constexpr, GROUP: tl.constexpr,
    STREAM: tl.constexpr, EXACT: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_n, tile_t = tile_of(tl.cdiv(rows, BLOCK_N), tl.cdiv(T, BLOCK_T), 8)
    split = tl.program_id(1)
    first = split * steps
    gate, up = products(
        x, data, scales, zeros, tile_t * BLOCK_T, tile_n * BLOCK_N,
        first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K)), T, K, x_units.to(tl.int64) * X_UNIT, rows, pitch, groups,
        BITS, True, GROUP, STREAM, EXACT, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    f, t = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :], (tile_t * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    mask = (t < T) & (f < rows)
    if SPLIT:  # partial (S, 2, T, F')
        at = (split.to(tl.int64) * 2 * T + t) * rows + f
        tl.store(out + at, gate, mask=mask)
        tl.store(out + at + T.to(tl.int64) * rows, up, mask=mask)
    else:
        value = _activated(gate, up, bias, f, F, BIAS, GELU)
        tl.store(out + t.to(tl.int64) * rows + f, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["F", "splits"])
def gated_finish_kernel(
    partial, bias, out, F, rows, splits, plane, BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK_N: tl.constexpr
):
    f, t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    mask = f < rows
    gate, up = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    at = partial + t * rows + f
    for _ in range(splits):
        gate += tl.load(at, mask=mask, other=0.0)
        up += tl.load(at + plane, mask=mask, other=0.0)
        at += 2 * plane
    value = _activated(gate, up, bias, f, F, BIAS, GELU)
    tl.store(out + t * rows + f, value.to(out.dtype.element_ty), mask=mask)


def gated_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str, config: LinearConfig | None = None
) -> Tensor:
    """As ``reference_linear.gated_linear``; x in fp16, bf16 or fp32."""
    operands = Operands(x, weight, weight.columns)
    config = config or choose_config(operands.problem(gated=True))
    tokens, padded, split = len(x), weight.data.shape[-2], config.splits > 1
    out = torch.empty(tokens, padded, dtype=x.dtype, device=x.device)
    to = torch.empty(config.splits, 2, tokens, padded, dtype=torch.float32, device=x.device) if split else out
    options = {"BIAS": bias is not None, "GELU": activation == "gelu_tanh"}
    bias_or_x = x if bias is None else bias.contiguous()
    with launching("gated_kernel", x.device):
        gated_kernel[operands.grid(config)](
            x, weight.data, operands.scale, operands.zero, bias_or_x, to,
            tokens, weight.rows, *operands.sizes(config), SPLIT=split, **options, **operands.constants(config),
        )  # fmt: skip
        if split:
            gated_finish_kernel[(-(-padded // FINISH_N), tokens)](
                to, bias_or_x, out, weight.rows, padded, config.splits, tokens * padded,
                **options, BLOCK_N=FINISH_N, num_warps=4,
            )  # fmt: skip
    return out
