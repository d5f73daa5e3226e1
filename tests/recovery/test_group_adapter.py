"""Adapters of quantised weights: merging is exact to the bit, gradients are those of the dense formula."""

import pytest
import torch
from torch.nn import functional as F

from saap.recovery import group_adapter
from saap.recovery.group_adapter import Factors, adapted_linear, merged, pool
from saap_kernels import linear, pack, unpack

RANK, GROUP, SCALING = 4, 32, 0.3


def case(bits: int, levels: bool, dtype: torch.dtype, columns: int = 99, rows: int = 70):
    torch.manual_seed(0)
    packed = pack(torch.randn(rows, columns, dtype=dtype) * 0.1, bits=bits, group_size=GROUP)
    groups = -(-columns // GROUP)
    shapes = [(RANK, groups), (rows, RANK), (RANK, columns), (rows, RANK)]
    tensors = [(0.3 * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]
    return packed, Factors(*tensors[:2], *(tensors[2:] if levels else (None, None)), SCALING)


@pytest.mark.parametrize("columns", [99, 128, 20])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_merging_is_exact_to_the_bit(bits, levels, dtype, tokens, columns) -> None:
    packed, factors = case(bits, levels, dtype, columns)
    x, bias = torch.randn(2, tokens, columns, dtype=dtype), torch.randn(70, dtype=dtype)
    found = merged(packed, factors)
    assert torch.equal(adapted_linear(x, packed, bias, factors), linear(x, found, bias))
    assert found.bits == bits and torch.equal(found.scale, packed.scale) and found.data.dtype == packed.data.dtype
    assert torch.equal(found.data, packed.data) is not levels


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_the_dense_formula(bits, levels) -> None:
    packed, factors = case(bits, levels, torch.float64)
    assert factors.a is not None and factors.b is not None
    x = torch.randn(2, 20, 99, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(70, dtype=torch.float64, requires_grad=True)
    learned = [x, bias, factors.a, factors.b, *([factors.u, factors.v] if levels else [])]
    dy = torch.randn(2, 20, 70, dtype=torch.float64)
    found = torch.autograd.grad(adapted_linear(x, packed, bias, factors), learned, dy)
    change = (SCALING * factors.b @ factors.a).repeat_interleave(GROUP, 1)[:, :99]
    if levels:
        change = change + SCALING * factors.v @ factors.u
    weight = unpack(merged(packed, factors), dtype=torch.float64) + change - change.detach()  # straight through
    for mine, theirs in zip(found, torch.autograd.grad(F.linear(x, weight, bias), learned, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)  # the same sums in another order


def test_the_zero_points_are_an_adapter_on_pooled_inputs() -> None:
    packed, factors = case(4, False, torch.float64)
    x = torch.randn(7, 99, dtype=torch.float64)
    wanted = linear(x, packed) + SCALING * pool(x, GROUP) @ factors.a.T @ factors.b.T
    torch.testing.assert_close(adapted_linear(x, packed, None, factors), wanted, rtol=0, atol=2e-5)  # fp32 zero points


def test_an_adapter_that_has_learned_nothing_changes_nothing() -> None:
    packed, factors = case(4, True, torch.float32)
    with torch.no_grad():
        factors.b.zero_()
        factors.v.zero_()
    found = merged(packed, factors)
    assert torch.equal(found.data, packed.data) and torch.equal(found.zero, packed.zero)


@pytest.mark.parametrize("rows,columns", [(70, 99), (72, 99), (70, 128), (64, 128)])  # aligned for a GPU's GEMM or not
@pytest.mark.parametrize("levels", [False, True])
def test_products_by_one_gemm_are_those_by_panels(levels, rows, columns) -> None:
    packed, factors = case(4, levels, torch.float32, columns, rows)
    operands = group_adapter._with_zero_points(packed, factors), group_adapter._change(factors)
    x, dy = torch.randn(40, columns), torch.randn(40, rows)
    for whole, panels, given in (
        (group_adapter._whole_product, group_adapter._product, x),
        (group_adapter._whole_product_with_columns, group_adapter._product_with_columns, dy),
    ):
        found, wanted = whole(given, *operands), panels(given, *operands)
        assert found.shape == wanted.shape and found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # fp32 sums of up to 128 in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [False, True])
def test_what_is_not_exact_differs_by_roundings(levels, dtype) -> None:
    packed, factors = case(4, levels, torch.float32)
    x, bias = torch.randn(2, 150, 99).to(dtype), torch.randn(70)
    with torch.no_grad():
        found, wanted = (adapted_linear(x, packed, bias, factors, exact=exact) for exact in (False, True))
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the last bit of the result, of sums of 99
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
