"""Triton inference kernels against float64: interpreted by test_triton_linear.py, on a device by test_gpu_triton.py."""

from dataclasses import replace

import pytest
import torch

import saap_kernels as K
from saap_kernels import reference_linear, triton_linear, use_backend
from saap_kernels.triton_config import LinearConfig
from tests.kernels import linear_oracles as oracles
from tests.kernels.linear_oracles import SHAPES, assert_as_exact_as_eager
from tests.kernels.test_inference_ops import case as problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
STORED = [(16, None), (8, None), (8, 32), (4, None), (4, 64), (4, 96), (4, 4096)]
SPLIT = LinearConfig(16, 64, 64, 4, 2, splits=3)
ACTIVATIONS = ("silu", "gelu_tanh")


def case(shape, dtype=torch.float16, bits=16, group=None, gated=False, pitch=9):
    """x, whose rows end ``pitch`` before the next in memory of NaN, packed weight and bias, on the CPU."""
    x, packed, bias = problem(shape, dtype, bits, group, gated)
    wide = torch.full((shape[0], shape[2] + pitch), torch.nan, dtype=dtype)[:, : shape[2]]
    return wide.copy_(x), packed, bias


def moved(x, packed, bias):
    """The same on the device, x in memory of NaN there too."""
    there = torch.full((len(x), x.stride(0)), torch.nan, dtype=x.dtype, device=DEVICE)[:, : x.shape[1]]
    return there.copy_(x), packed.to(DEVICE), None if bias is None else bias.to(DEVICE)


def check_linear(x, packed, bias, config=None):
    found = triton_linear.linear(*moved(x, packed, bias), config)
    assert found.is_contiguous()
    assert_as_exact_as_eager(found.cpu(), reference_linear.linear(x, packed, bias), oracles.linear(x, packed, bias))
    return found


def check_gated(x, packed, bias, activation, config=None):
    found = triton_linear.gated_linear(*moved(x, packed, bias), activation, config)
    width = packed.rows
    assert found.shape[1] == -(-width // 64) * 64 and not found[:, width:].any()
    eager = reference_linear.gated_linear(x, packed, bias, activation)[:, :width].double()
    exact = oracles.gated_linear(x, packed, bias, activation=activation)
    gate, up = (oracles.linear(x, packed, None)[index] for index in range(2))
    if bias is not None:
        gate, up = gate + bias[0].double(), up + bias[1].double()
    # a rounding of the activation's argument moves it by as much as one of gate * up
    allowed = 2 * (eager - exact).abs().max() + torch.finfo(x.dtype).eps * (gate * up).abs().max()
    assert (found[:, :width].cpu().double() - exact).abs().max() <= allowed
    return found


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, dtype, stored) -> None:
    x, packed, bias = case(shape, dtype, *stored)
    check_linear(x, packed, bias if shape[0] % 2 else None)


@pytest.mark.parametrize("stored", STORED[::2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_linear(shape, dtype, stored) -> None:
    x, packed, bias = case(shape, dtype, *stored, gated=True)
    activation = ACTIVATIONS[shape[1] % 2]
    check_gated(x, packed, bias if shape[0] % 2 else None, activation)


@pytest.mark.parametrize("stored", [(16, None), (8, 64), (4, 128)], ids=str)
@pytest.mark.parametrize("shape", [(1, 65, 640), (3, 64, 257), (16, 129, 385)], ids=str)
def test_splits_are_added(shape, stored) -> None:
    given = case(shape, torch.float16, *stored)
    found = check_linear(*given, SPLIT)
    assert torch.equal(found, triton_linear.linear(*moved(*given), SPLIT))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stored", [(16, None), (8, 64), (4, 128)], ids=str)
def test_splits_of_gated_linear_are_added(stored, activation) -> None:
    given = case((3, 65, 257), torch.float16, *stored, gated=True)
    found = check_gated(*given, activation, SPLIT)
    assert torch.equal(found, triton_linear.gated_linear(*moved(*given), activation, SPLIT))


def test_a_split_without_a_step_adds_nothing() -> None:
    check_linear(*case((2, 5, 193)), replace(SPLIT, splits=7))


@pytest.mark.parametrize("pitch", [0, 7, 64 - 57 % 8])
@pytest.mark.parametrize("stored", [(16, None), (8, None), (4, None)], ids=str)
def test_rows_of_tokens_may_be_any_pitch_apart(stored, pitch) -> None:
    """Whatever lies behind them: the last is one at which reads are wide."""
    check_linear(*case((5, 17, 57 + 128), torch.float16, *stored, pitch=pitch))


@pytest.mark.parametrize("beyond", [0, 1])
def test_tokens_may_be_two_to_the_31_elements_apart(beyond) -> None:
    """At which a pitch counted in eights still fits 32 bits; the system need not keep zeros that nobody writes."""
    x, packed, bias = case((2, 17, 185), torch.float16)
    pitch = 2**31 + beyond
    far = torch.zeros(pitch + 185, dtype=torch.float16, device=DEVICE).as_strided(x.shape, (pitch, 1))
    far.copy_(x)
    there = moved(x, packed, bias)
    assert torch.equal(triton_linear.linear(far, *there[1:]), triton_linear.linear(*there))
    _, up, _ = (each if isinstance(each, torch.Tensor) else each.to(DEVICE) for each in case((2, 17, 185), gated=True))
    gated = [triton_linear.gated_linear(each, up, None, "silu") for each in (far, there[0])]
    assert torch.equal(*gated)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [2, 17])
def test_padded_rows_are_those_that_gated_linear_leaves(tokens, bits) -> None:
    x, up, _ = case((tokens, 193, 40), gated=True)
    _, down, bias = case((tokens, 33, 193), bits=bits)
    there = moved(x, up, bias)
    h = triton_linear.gated_linear(*there[:2], None, "silu")
    found = triton_linear.linear_of_padded(h, down.to(DEVICE), there[2]).cpu()
    eager = reference_linear.linear_of_padded(h.cpu(), down, bias)
    assert_as_exact_as_eager(found, eager, oracles.linear(h[:, :193].cpu(), down, bias))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("stored", [(16, None), (8, None), (4, None)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_values_that_are_not_finite_stay_in_their_row(tokens, stored, value) -> None:
    x, packed, _ = case((tokens, 9, 70), torch.float32, *stored)
    x[-1, 3] = value
    found, expected = triton_linear.linear(*moved(x, packed, None)).cpu(), reference_linear.linear(x, packed, None)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    assert found[:-1].isfinite().all() and not found[-1].isfinite().any()
    up = case((tokens, 9, 70), torch.float32, *stored, gated=True)[1].to(DEVICE)
    h = triton_linear.gated_linear(moved(x, packed, None)[0], up, None, "silu")
    assert not h[:, 9:].any() and h[:-1].isfinite().all() and not h[-1, :9].isfinite().all()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weights_of_another_dtype_than_x(bits) -> None:
    _, packed, _ = case((3, 33, 200), torch.float32, bits)
    x, _, bias = case((3, 33, 200), torch.float16)
    check_linear(x, packed, bias)


def test_a_bias_of_any_stride() -> None:
    x, packed, bias = case((3, 9, 70))
    wide = torch.full((9, 2), torch.nan, dtype=bias.dtype)
    wide[:, 0] = bias
    there = moved(x, packed, None)
    assert torch.equal(
        triton_linear.linear(*there[:2], wide.to(DEVICE)[:, 0]), triton_linear.linear(*there[:2], bias.to(DEVICE))
    )


@pytest.mark.parametrize("bits", [16, 4])
def test_the_public_ops_run_these_kernels(bits) -> None:
    x, up, up_bias = (each.to(DEVICE) for each in case((3, 33, 70), bits=bits, gated=True))
    _, down, down_bias = (each.to(DEVICE) for each in case((3, 9, 33), bits=bits))
    with use_backend("triton"):
        h, y = K.gated_linear(x, up, up_bias, activation="silu"), K.linear(x[:, :33], down, down_bias)
        whole = K.gated_mlp(x, up, down, up_bias, down_bias, activation="silu")
    assert torch.equal(h, triton_linear.gated_linear(x, up, up_bias, "silu")[:, :33])
    assert torch.equal(y, triton_linear.linear(x[:, :33], down, down_bias))
    padded = triton_linear.gated_linear(x, up, up_bias, "silu")
    assert torch.equal(whole, triton_linear.linear_of_padded(padded, down, down_bias))
