"""Inference ops by their definition in float64, and what they are run on."""

import torch
from torch import Tensor
from torch.nn import functional

from saap_kernels import PackedWeight, unpack

ACTIVATIONS = {"silu": functional.silu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh")}
# (T, N, K): aligned, odd, tiny, wide and narrow; one token, the decode path's last, and a GEMM's
SHAPES = [
    (1, 64, 128), (1, 1, 1), (2, 3, 5), (3, 129, 257), (5, 63, 65), (16, 96, 384), (17, 131, 127), (33, 255, 193),
]  # fmt: skip


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    result = x.double() @ unpack(packed, dtype=torch.float64).mT
    return result if bias is None else result + bias.double()


def gated_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, activation: str) -> Tensor:
    gate, up = (x.double() @ each.T for each in unpack(packed, dtype=torch.float64))
    if bias is not None:
        gate, up = gate + bias[0].double(), up + bias[1].double()
    return ACTIVATIONS[activation](gate) * up


def gated_mlp(x, packed_gate_up, packed_down, gate_up_bias=None, down_bias=None, *, activation: str) -> Tensor:
    return linear(gated_linear(x, packed_gate_up, gate_up_bias, activation=activation), packed_down, down_bias)


def assert_as_exact_as_eager(found: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Largest error at most twice that of torch in the same dtype, plus one rounding of the largest result."""
    assert found.dtype == eager.dtype and found.shape == exact.shape
    scale = exact.abs().max() if exact.numel() else 0
    allowed = 2 * (eager.double() - exact).abs().max() + torch.finfo(found.dtype).eps * scale
    worst = (found.double() - exact).abs().max()
    assert worst <= allowed, f"largest error {worst:.3e}, allowed {allowed:.3e}"
