"""CUDA C++ inference kernels against float64: on the host by test_cuda_emulated.py, on a device by test_gpu_cuda.py.

The functions of ``saap_kernels.cuda_linear`` are called directly, so that the same cases run in both places.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from saap_kernels import cuda_linear, library_linear, reference_linear
from saap_kernels.cuda import native
from tests.kernels import linear_oracles as oracles
from tests.kernels.cuda_cases import on_device
from tests.kernels.linear_oracles import SHAPES, assert_as_exact_as_eager
from tests.kernels.test_inference_ops import case

FEW = [shape for shape in SHAPES if shape[0] <= cuda_linear.TOKENS]
HALVES = (torch.float16, torch.bfloat16)
# bits and groups: whole stages and several a stage, groups that end in the middle of a pair of units
STORED = [(16, None), (8, None), (4, None), (8, 32), (4, 32), (4, 96), (8, 160)]


def there(packed):
    """The packed weight on the device."""
    parts = (packed.data, packed.scale, packed.zero)
    data, scale, zero = (None if part is None else on_device(part)[0] for part in parts)
    return replace(packed, data=data, scale=scale, zero=zero)


def view_of(x: torch.Tensor, pitch: int) -> torch.Tensor:
    """x with another pitch: whatever is not x is NaN."""
    storage = torch.full((x.shape[0], pitch), float("nan"), dtype=x.dtype)
    storage[:, : x.shape[1]] = x
    return on_device(storage)[0][:, : x.shape[1]]


def run_linear(x, packed, bias, pitch=None):
    given = on_device(x)[0] if pitch is None else view_of(x, pitch)
    return cuda_linear.linear(given, there(packed), None if bias is None else on_device(bias)[0]).cpu()


@pytest.fixture
def planned(monkeypatch):
    """Lets a test say how many warps and blocks share the columns."""

    def by(slices: int, splits: int) -> None:
        monkeypatch.setattr(cuda_linear, "plan", lambda *shape: (slices, splits))

    return by


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_linear_of_few_tokens(shape, dtype, stored):
    x, packed, bias = case(shape, dtype, *stored)
    eager, exact = reference_linear.linear(x, packed, bias), oracles.linear(x, packed, bias)
    for pitch in (None, shape[2] + 3, -(-(shape[2] + 1) // 8) * 8):  # contiguous, any, and whole 16 bytes
        assert_as_exact_as_eager(run_linear(x, packed, bias, pitch), eager, exact)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_slices_and_splits_of_long_rows(tokens, dtype, bits, planned):
    x, packed, bias = case((tokens, 70, 2 * 1024 + 130), dtype, bits)
    eager, exact = reference_linear.linear(x, packed, bias), oracles.linear(x, packed, bias)
    most = cuda_linear.most_slices(tokens, bits)
    for slices, splits in product({1, most // 2, most} - {0}, (1, 3)):
        planned(slices, splits)
        found = run_linear(x, packed, bias)
        assert_as_exact_as_eager(found, eager, exact)
        assert torch.equal(found, run_linear(x, packed, bias, x.shape[1] + 1))  # the same sums in the same order


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("stored", STORED[:5], ids=str)
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize(("shape", "parts"), [*zip(FEW, ((1, 1), (2, 1), (1, 2), (2, 1), (1, 1), (1, 2)), strict=True)])
def test_gated_linear_of_few_tokens(shape, parts, dtype, stored, activation, planned):
    planned(*parts)
    x, packed, bias = case(shape, dtype, *stored, gated=True, bias=activation == "silu")
    given = None if bias is None else on_device(bias)[0]
    found = cuda_linear.gated_linear(view_of(x, shape[2] + 5), there(packed), given, activation).cpu()
    assert found.shape == (shape[0], -(-shape[1] // 64) * 64) and not found[:, shape[1] :].any()
    eager = reference_linear.gated_linear(x, packed, bias, activation)[:, : shape[1]]
    exact = oracles.gated_linear(x, packed, bias, activation=activation)
    assert_as_exact_as_eager(found[:, : shape[1]], eager, exact)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
def test_a_padded_result_goes_into_the_next_product(dtype, bits):
    x, up, up_bias = case((3, 37, 70), dtype, bits, gated=True)
    _, down, down_bias = case((3, 11, 37), dtype, bits)
    on = [there(up), there(down), *on_device(up_bias, down_bias, x)]
    h = cuda_linear.gated_linear(on[4], on[0], on[2], "silu")
    found = cuda_linear.linear_of_padded(h, on[1], on[3]).cpu()
    eager = reference_linear.linear(reference_linear.gated_linear(x, up, up_bias, "silu")[:, :37], down, down_bias)
    assert_as_exact_as_eager(found, eager, oracles.gated_mlp(x, up, down, up_bias, down_bias, activation="silu"))


@pytest.mark.parametrize("kept", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_may_have_another_dtype_than_x(bits, dtype, kept):
    x, packed, bias = case((3, 33, 257), dtype, bits, 32)
    packed = replace(packed, scale=packed.scale.to(kept), zero=packed.zero.to(kept))
    eager, exact = reference_linear.linear(x, packed, bias), oracles.linear(x, packed, bias)
    assert_as_exact_as_eager(run_linear(x, packed, bias), eager, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize("tokens", [1, 11])
def test_values_that_are_not_finite_come_out_as_torch_has_them(tokens, dtype, bits, value):
    x, packed, _ = case((tokens, 40, 300), dtype, bits, bias=False)
    x[-1, 150] = value
    found, expected = run_linear(x, packed, None), reference_linear.linear(x.float(), packed, None)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isposinf(), expected.isposinf())
    assert torch.equal(found.isneginf(), expected.isneginf()) and found[:-1].isfinite().all()
    eager, exact = reference_linear.linear(x[:-1], packed, None), oracles.linear(x[:-1], packed)
    if tokens > 1:
        assert_as_exact_as_eager(found[:-1], eager, exact)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", range(1, 17))
def test_plans_fill_the_device_within_a_blocks_memory(tokens, bits):
    lines_of_block, stage_bytes, elements = native().linear_decode_tile()
    for lines, columns in product((1, 1024, 4096, 28672, 1 << 20), (1, 640, 4096, 14336)):
        slices, splits = cuda_linear.plan(lines, columns, tokens, bits, 132)
        assert slices in (1, 2, 4, 8) and slices <= (8 if tokens <= 8 else 4)  # warps of a block
        assert tokens * slices * stage_bytes * 8 // bits <= elements
        stages = -(-columns * bits // (8 * stage_bytes))
        assert slices <= stages and splits <= max(1, stages // slices // 4)
        if (lines, columns) == (4096, 4096):  # q and o of a 7B model, and no second stage for few tokens
            assert splits * lines * slices // lines_of_block >= 128 and (splits == 1 or tokens > 2)


@pytest.mark.parametrize("gated", [False, True])
def test_few_rows_of_many_columns_are_shared_by_blocks(gated, monkeypatch):
    monkeypatch.setattr(cuda_linear, "processors", lambda device: 132)
    shape = (2, 40, 6000)
    x, packed, bias = case(shape, torch.bfloat16, gated=gated)
    assert cuda_linear.plan(40 * (1 + gated), shape[2], 2, 16, 132)[1] > 1
    if gated:
        found = cuda_linear.gated_linear(*on_device(x), there(packed), *on_device(bias), "silu").cpu()[:, :40]
        eager, exact = reference_linear.gated_linear(x, packed, bias, "silu"), oracles.gated_linear
        assert_as_exact_as_eager(found, eager[:, :40], exact(x, packed, bias, activation="silu"))
    else:
        eager, exact = reference_linear.linear(x, packed, bias), oracles.linear(x, packed, bias)
        assert_as_exact_as_eager(run_linear(x, packed, bias), eager, exact)


def test_more_tokens_and_other_dtypes_run_the_librarys_product(monkeypatch):
    monkeypatch.setattr(cuda_linear, "_decode", None)
    x, packed, bias = case((17, 5, 70), torch.float16)
    expected = library_linear.linear(*on_device(x), there(packed), *on_device(bias)).cpu()
    assert torch.equal(run_linear(x, packed, bias), expected)
    x, _, bias = case((2, 5, 70), torch.bfloat16)
    assert run_linear(x, packed, bias).dtype == torch.bfloat16  # a weight in fp16
    x, up, up_bias = case((17, 5, 70), torch.float16, 8, gated=True)
    found = cuda_linear.gated_linear(*on_device(x), there(up), *on_device(up_bias), "silu").cpu()
    assert found.shape == (17, 64) and not found[:, 5:].any()
