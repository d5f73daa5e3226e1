"""The activation behind the library's GEMM, fused by Triton: interpreted by test_library_linear.py, on a device too."""

import pytest
import torch

from saap_kernels.triton_gating import BLOCK, gated_product
from tests.kernels.linear_oracles import ACTIVATIONS, assert_as_exact_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 64), (2, 577), (2, BLOCK + 1)])
def test_gated_product(tokens, width, dtype, activation) -> None:
    padded = -(-width // 64) * 64
    both = torch.randn(tokens, 2 * padded, generator=torch.Generator().manual_seed(width)).mul(4).to(dtype)
    gate, up = both[:, :width], both[:, padded:][:, :width]
    found = gated_product(both.to(DEVICE), width, activation).cpu()
    assert found.shape == (tokens, padded) and not found[:, width:].any()
    act = ACTIVATIONS[activation]
    assert_as_exact_as_eager(found[:, :width], act(gate) * up, act(gate.double()) * up.double())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite_are_torchs_and_leave_the_padding_zero(activation) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0])
    both = torch.full((6, 128), torch.nan)
    both[:, :6], both[:, 64:70] = values, values[:, None]
    found = gated_product(both.to(DEVICE), 6, activation).cpu()
    wanted = ACTIVATIONS[activation](both[:, :6]) * both[:, 64:70]
    torch.testing.assert_close(found[:, :6], wanted, equal_nan=True)
    assert not found[:, 6:].any()
