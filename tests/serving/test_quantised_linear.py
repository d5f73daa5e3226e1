"""QuantisedLinear: the values of its packed weight, one copy of them, the stored form in its state dict, gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saap.packed_linear import half
from saap.quantised_linear import QuantisedLinear, is_quantised
from saap.stored_weight import NAMES, stored_shapes
from saap_kernels import pack

SHAPES = [(5, 7), (64, 64), (97, 33), (128, 130)]  # odd widths, a last group that is shorter, rows of padding


def make(shape=(97, 33), bits=4, group=32, bias=True, dtype=torch.float32) -> QuantisedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    QuantisedLinear.convert(linear, pack(linear.weight, bits=bits, group_size=group))
    return linear  # type: ignore[return-value]  # of this class from here on


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_with_the_weight_that_its_state_says(shape, bits: int, group: int) -> None:
    linear = make(shape, bits, group)
    stored, x = linear.state_dict(), torch.randn(3, shape[1])
    assert {name: tuple(stored[name].shape) for name in NAMES} == stored_shapes(shape, bits, group)
    assert stored["qweight"].dtype == (torch.uint8 if bits == 4 else torch.int8)
    quantised = stored["qweight"]
    if bits == 4:
        quantised = torch.stack([quantised & 15, quantised >> 4], -1).flatten(1)[:, : shape[1]]
    scale, zero = (stored[name].double().repeat_interleave(group, 1)[:, : shape[1]] for name in ("qscale", "qzero"))
    weight = scale * quantised + zero
    torch.testing.assert_close(linear.unpacked_weight().double(), weight, rtol=1e-6, atol=1e-7)  # fp32 products
    wanted = F.linear(x.double(), weight, linear.bias.double())
    torch.testing.assert_close(linear(x).double(), wanted, rtol=1e-5, atol=1e-5)  # fp32 sums of up to 130


def test_there_is_one_copy_and_no_parameter_but_the_bias() -> None:
    linear = make((128, 256), bits=4)
    assert [name for name, _ in linear.named_parameters()] == ["bias"] and linear.weight is None
    assert sum(buffer.nbytes for buffer in linear.buffers()) == linear.packed.nbytes == 128 * (256 // 2 + 2 * 4 * 8)


def test_it_is_differentiable_in_the_input_and_in_scale_and_zero() -> None:
    linear, x = make(), torch.randn(4, 33, requires_grad=True)
    weight = linear.unpacked_weight()
    for name in ("qscale", "qzero"):
        getattr(linear, name).requires_grad_()
    linear(x).square().sum().backward()
    dy = 2 * (x.detach() @ weight.T + linear.bias.detach())
    torch.testing.assert_close(x.grad, dy @ weight, rtol=1e-4, atol=1e-4)  # fp32 sums of 97
    scale, zero = (getattr(linear, name)[:97].detach().repeat_interleave(32, 1)[:, :33] for name in ("qscale", "qzero"))
    steps = ((weight - zero) / scale.clamp_min(1e-20)).round()  # a group of one weight has no scale and Q = 0
    for name, factor in (("qzero", 1), ("qscale", steps)):
        wanted = F.pad(dy.T @ x.detach() * factor, (0, 31)).unflatten(1, (2, 32)).sum(-1)
        torch.testing.assert_close(
            getattr(linear, name).grad[:97], wanted, rtol=1e-4, atol=1e-2
        )  # fp32, sums of some 1e3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_state_dict_brings_everything_back(bits: int) -> None:
    linear, other = make(bits=bits), make(bits=bits)
    x = torch.randn(2, 33)
    other.place(pack(torch.randn(97, 33), bits=bits, group_size=32))
    assert not torch.equal(other(x), linear(x))
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))
    for again in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(again(x), linear(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("qscale"), "Missing key.*qscale"),
        (lambda state: state.update(weight=torch.zeros(97, 33)), "weight: the model is quantised and takes qweight"),
        (lambda state: state.update(qweight=torch.zeros(97, 16, dtype=torch.uint8)), r"expected shape \(97, 17\)"),
        (lambda state: state["qzero"].fill_(torch.nan), "qzero: expected finite values, found NaN or inf"),
        (lambda state: state.update(qweight=state["qweight"].to(torch.int8)), "expected torch.uint8 for 4 bits"),
    ],
)
def test_other_state_is_refused_by_name(change, message: str) -> None:
    linear, x = make(), torch.randn(2, 33)
    before, state = linear(x), {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    change(state)
    with pytest.raises(RuntimeError, match=message):
        linear.load_state_dict(state)
    assert torch.equal(linear(x), before)


def test_dtypes_reach_scale_and_zero_only() -> None:
    linear, x = make(), torch.randn(2, 33)
    before, data = linear(x), linear.qweight
    linear.to(torch.bfloat16)
    assert linear.qweight.dtype == torch.uint8 and torch.equal(linear.qweight, data)
    assert linear.qscale.dtype == linear.qzero.dtype == linear.unpacked_weight().dtype == torch.bfloat16
    # bf16 keeps 8 bits: scale, zero, x, bias and result are each rounded by at most 2**-9
    torch.testing.assert_close(linear(x.bfloat16()).float(), before, rtol=0.02, atol=0.05)
    assert is_quantised(nn.Sequential(linear)) and not is_quantised(nn.Sequential(nn.Linear(2, 2)))


def test_a_pair_is_the_same_matrix_by_halves() -> None:
    linear, x = make((94, 33)), torch.randn(2, 33)
    before, state = linear(x), linear.state_dict()
    linear.as_pair()
    gate, up = half(linear.packed, 0), half(linear.packed, 1)
    assert gate.shape == up.shape == (47, 33)
    torch.testing.assert_close(linear(x), before, rtol=1e-5, atol=1e-6)  # the same products in other blocks
    assert all(torch.equal(state[name], tensor) for name, tensor in linear.state_dict().items())
    linear.as_matrix()
    assert torch.equal(linear(x), before)


def test_restore_makes_a_linear_of_the_same_values() -> None:
    linear, x = make(), torch.randn(2, 33)
    before, weight = linear(x), linear.unpacked_weight()
    linear.restore()
    assert type(linear) is nn.Linear and torch.equal(linear.weight, weight) and linear.weight.requires_grad
    torch.testing.assert_close(linear(x), before, rtol=1e-5, atol=1e-6)  # the library's sums


def test_on_the_meta_device_it_has_the_sizes_of_the_stored_form() -> None:
    with torch.device("meta"):
        linear = nn.Linear(33, 97)
    QuantisedLinear.convert_blank(linear, 4, 64)
    state = linear.state_dict()
    assert {name: tuple(state[name].shape) for name in NAMES} == stored_shapes((97, 33), 4, 64)
    assert linear.unpacked_weight().shape == (97, 33) and linear.unpacked_weight().is_meta
    with pytest.raises(ValueError, match="the checkpoint has no up_proj.qweight"):
        linear.pack_stored("up_proj")
