"""Triton: act(gate) * up of one product's halves in one pass, where the library's GEMM has made both."""

import triton
import triton.language as tl
from torch import Tensor

from saap_kernels._launch import launching

BLOCK, WARPS = 2048, 8  # features of a program: each thread reads 16 bytes of 16-bit values of either half
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """act(gate) * up in fp32, both activations as gate * sigmoid(argument)."""
    argument = gate
    if GELU:  # 1 + tanh(u) is twice the sigmoid of 2u
        argument = SQRT_8_OVER_PI * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-argument)) * up


@triton.jit
def gating_kernel(both, h, width, padded, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = features < padded  # a multiple of 64: loads and stores stay wide, whatever the width is
    gate = tl.load(both + row * 2 * padded + features, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * padded + padded + features, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(features < width, gated(gate, up, GELU), 0.0)  # 0 * NaN, where x is not finite
    tl.store(h + row * padded + features, value.to(h.dtype.element_ty), mask=inside)


def gated_product(both: Tensor, width: int, activation: str) -> Tensor:
    """h (T, F') of ``both`` (T, 2 F') contiguous, gate beside up: zero beyond ``width``."""
    tokens, padded = len(both), both.shape[1] // 2
    with launching("gating_kernel", both.device):
        h = both.new_empty(tokens, padded)
        gating_kernel[(tokens, -(-padded // BLOCK))](
            both, h, width, padded, GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=WARPS
        )
    return h
