"""``pack`` and ``unpack``: exact where it is promised, half a step where it quantises, zero padding, clear errors."""

from dataclasses import replace

import pytest
import torch

from saap_kernels import pack, unpack
from saap_kernels.packed import from_nibbles, unpacked

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = [(1, 1), (3, 5), (64, 128), (65, 129), (130, 257), (2, 33, 96), (2, 64, 127)]


def weight_of(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sixteen_bits_are_exact(shape, dtype):
    weight = weight_of(shape, dtype)
    packed = pack(weight)
    assert torch.equal(unpack(packed), weight)
    assert unpack(packed).data_ptr() == packed.data.data_ptr()  # a view
    assert packed.data.sum(dtype=torch.float64) == pytest.approx(weight.sum(dtype=torch.float64).item(), abs=1e-9)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 128, 1024])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_within_half_a_step(shape, dtype, group, bits):
    weight = weight_of(shape, dtype)
    packed = pack(weight, bits=bits, group_size=group)
    found, columns = unpack(packed, dtype=torch.float64), shape[-1]
    step = packed.scale.double()[..., : shape[-2], :].repeat_interleave(group, -1)[..., :columns]
    # zero is rounded to its dtype; fp32 arithmetic of the quotient
    rounding = torch.finfo(packed.zero.dtype).eps * packed.zero.abs().max().double() + 1e-6
    assert ((found - weight.double()).abs() <= step / 2 + rounding).all()
    assert unpack(packed).shape == shape and unpack(packed).dtype == packed.scale.dtype


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_padding_is_zero(bits):
    packed = pack(weight_of((2, 65, 129)) + 3, bits=bits)
    whole = unpacked(packed)
    assert not whole[..., 65:, :].any() and not whole[..., 129:].any()
    assert not packed.data[:, 65:].any()
    assert packed.data.data_ptr() % 64 == 0 and packed.data.stride(-2) * packed.data.itemsize % 64 == 0


def test_nibbles_are_halves_of_blocks():
    packed = pack(torch.arange(16.0).repeat(4)[None], bits=4, group_size=64)
    assert torch.equal(from_nibbles(packed.data)[0, :64], torch.arange(16, dtype=torch.uint8).repeat(4))
    assert packed.data[0, 5] == 5 | 5 << 4 and packed.data[0, 17] == 1 | 1 << 4


def test_equal_weights_and_powers_are_exact():
    for bits in (8, 4):
        assert torch.equal(unpack(pack(torch.full((3, 40), 0.7), bits=bits)), torch.full((3, 40), 0.7))
    steps = torch.arange(16.0).repeat(3, 8) * 0.25 - 1
    assert torch.equal(unpack(pack(steps, bits=4)), steps)


def test_subnormal_half_weights_stay_finite():
    weight = weight_of((4, 64)).mul(1e-7).half()
    for bits in (8, 4):
        found = unpack(pack(weight, bits=bits))
        assert found.isfinite().all() and (found - weight).abs().max() <= 2.0**-24 * 8


def test_to_moves_and_converts():
    packed = pack(weight_of((3, 5)))
    assert packed.to(torch.float16).data.dtype == torch.float16
    with pytest.raises(ValueError, match="8 bits cannot become torch.float16"):
        pack(weight_of((3, 5)), bits=8).to(torch.float16)
    assert pack(weight_of((3, 5)), bits=8).to("meta").scale.device.type == "meta"


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        ([1.0], {}, "expected a tensor, got list"),
        (torch.zeros(3), {}, r"expected shape \(N, K\) or \(2, N, K\), none of them 0, got \(3,\)"),
        (torch.zeros(3, 2, 2), {}, r"got \(3, 2, 2\)"),
        (torch.zeros(0, 2), {}, r"got \(0, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int8), {}, "expected a floating-point dtype, got torch.int8"),
        (torch.zeros(2, 2), {"bits": 3}, "bits: expected one of 16, 8, 4, got 3"),
        (torch.zeros(2, 2), {"group_size": 32}, "group_size: expected None for bits=16"),
        (torch.zeros(2, 2), {"bits": 4, "group_size": 48}, "positive multiple of 32, got 48"),
        (torch.zeros(2, 2), {"bits": 4, "group_size": 0}, "positive multiple of 32, got 0"),
        (torch.full((2, 2), torch.nan), {"bits": 8}, "expected finite values to quantise to 8 bits"),
        (torch.tensor([[-3e38, 3e38]]), {"bits": 8}, r"groups whose range fits torch.float32, got values up to 3e\+38"),
        (torch.tensor([[1e300]], dtype=torch.float64), {"bits": 4}, r"got values up to 1e\+300"),
    ],
)
def test_bad_weights(weight, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pack(weight, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected layout version 1, got 2: pack the weight again"),
        ({"bits": 3}, "expected bits among 16, 8, 4, got 3"),
        ({"bits": 16}, "expected data of torch.float16 for 16 bits, got torch.int8"),
        ({"scale": None}, "expected scale, zero and a group size for 8 bits"),
        ({"group_size": 48}, "expected a group size in 32s, got 48"),
        ({"zero": torch.zeros(64, 1, dtype=torch.float16)}, "dtype, got torch.float32 and torch.float16"),
        ({"scale": torch.zeros(64, 1, dtype=torch.int8)}, "dtype, got torch.int8 and torch.float32"),
        ({"group_size": 32}, r"expected contiguous scale \(64, 3\)"),
        ({"shape": (4, 200)}, r"expected contiguous data \(64, 256\)"),
        ({"zero": torch.zeros(64, 1, device="meta")}, "expected zero on cpu, got meta"),
    ],
)
def test_bad_packed_weights(change, message):
    packed = pack(weight_of((4, 65)), bits=8)
    with pytest.raises(ValueError, match=message):
        unpack(replace(packed, **change))
    with pytest.raises(TypeError, match="packed: expected a PackedWeight, as pack"):
        unpack(torch.zeros(2, 2))
