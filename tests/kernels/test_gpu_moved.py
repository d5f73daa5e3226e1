"""Adapters of quantised weights on a device: Triton's levels, whole products, merging to the bit, gradients."""

import pytest
import torch
from torch.nn import functional as F

from saap.recovery.group_adapter import Factors, adapted_linear, merged
from saap_kernels import linear, pack, unpack
from tests.kernels.triton_moved_cases import *  # noqa: F403  every case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("columns", [99, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_on_a_device(bits, levels, dtype, columns, tokens) -> None:
    torch.manual_seed(0)
    packed = pack(0.1 * torch.randn(70, columns, dtype=dtype), bits=bits, group_size=32).to("cuda")
    shapes = [(3, -(-columns // 32)), (70, 3), (3, columns), (70, 3)]
    tensors = [(0.3 * torch.randn(shape)).cuda().requires_grad_() for shape in shapes]
    factors = Factors(*tensors[:2], *(tensors[2:] if levels else (None, None)), 0.3)
    x = torch.randn(tokens, columns, dtype=dtype, device="cuda", requires_grad=True)
    found = merged(packed, factors)
    assert torch.equal(adapted_linear(x, packed, None, factors), linear(x, found))
    learned = [x, *tensors[: 4 if levels else 2]]
    change = (0.3 * tensors[1] @ tensors[0]).repeat_interleave(32, 1)[:, :columns]
    if levels:
        change = change + 0.3 * tensors[3] @ tensors[2]
    weight = unpack(found, dtype=torch.float32) + change - change.detach()  # straight through
    dense, dy = F.linear(x.float(), weight), torch.randn(tokens, 70, dtype=dtype, device="cuda")
    mine = adapted_linear(x, packed, None, factors, exact=False)
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2  # of the largest; TF32 may run, weights are rounded to bf16
    pairs = [(mine, dense)]
    pairs += zip(torch.autograd.grad(mine, learned, dy), torch.autograd.grad(dense, learned, dy.float()), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=tolerance * float(other.abs().max()))
