"""Quantising one weight: ranges, searched ranges, error compensation; against brute force and the product's error."""

import pytest
import torch

from saap.clip_search import SHRINKS, searched_scale_and_zero
from saap.gptq import quantise_weight
from saap_kernels import pack, unpack
from saap_kernels.group_quantise import nearest_levels, scale_and_zero


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    return torch.randn(tokens, columns, generator=generator) @ mixed


def lost(x: torch.Tensor, weight: torch.Tensor, packed) -> float:
    return float((x @ (unpack(packed, dtype=torch.float32) - weight).T).square().mean())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [128, 199, 31])
def test_without_options_it_is_what_pack_makes(bits, columns) -> None:
    weight = torch.randn(33, columns, generator=torch.Generator().manual_seed(1))
    ours, plain = quantise_weight(weight, bits=bits, group_size=32), pack(weight, bits=bits, group_size=32)
    assert all(torch.equal(getattr(ours, name), getattr(plain, name)) for name in ("data", "scale", "zero"))


@pytest.mark.parametrize("columns", [128, 199])
def test_each_option_loses_less_of_the_product(columns) -> None:
    x, weight = correlated(3000, columns), torch.randn(96, columns, generator=torch.Generator().manual_seed(2)) * 0.05
    options = {"bits": 4, "group_size": 32}
    gram = (x.T @ x).double()
    plain, clipped, compensated, both = (
        lost(x, weight, quantise_weight(weight, **options, clip=clip, gram=given))
        for clip, given in ((False, None), (True, None), (False, gram), (True, gram))
    )
    assert clipped < plain and compensated < 0.7 * plain and both < 0.7 * plain  # measured: 0.93, 0.47 and 0.45


def test_searched_ranges_are_the_best_of_those_tried() -> None:
    values = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(3))
    importance = torch.rand(3, 32, generator=torch.Generator().manual_seed(4))

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        scale, zero = scale[..., None], zero[..., None]
        back = nearest_levels(values, scale, zero, 4) * scale + zero
        return ((back - values).square() * importance).sum(-1)

    tried = [scale_and_zero(values.amin(-1) * s, values.amax(-1) * s, 4, torch.float32) for s in SHRINKS]
    best = torch.stack([error(*each) for each in tried]).amin(0)
    assert torch.equal(error(*searched_scale_and_zero(values, 4, torch.float32, importance)), best)


def test_inputs_that_are_always_zero_and_uncorrelated_ones_change_nothing() -> None:
    weight = torch.randn(8, 70, generator=torch.Generator().manual_seed(5))
    gram = torch.eye(70, dtype=torch.float64) * 3
    gram[40:] = 0
    found = quantise_weight(weight, bits=4, group_size=32, gram=gram)
    assert torch.equal(found.data, pack(weight, bits=4, group_size=32).data)  # nothing can be carried to another column


def test_a_gram_matrix_that_is_not_finite_is_refused() -> None:
    gram = torch.full((8, 8), torch.nan)
    with pytest.raises(ValueError, match="gram: expected a finite matrix"):
        quantise_weight(torch.randn(4, 8), bits=4, group_size=32, gram=gram)
