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


def textbook(weight: torch.Tensor, gram: torch.Tensor, group: int) -> torch.Tensor:
    """W~ of 4 bits by GPTQ as its paper has it, in float64: the inverse loses one column at a time."""
    weight, columns = weight.double().clone(), weight.shape[1]
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    found = torch.empty_like(weight)
    for column in range(columns):
        if column % group == 0:
            part = weight[:, column : column + group]
            scale, zero = scale_and_zero(part.amin(1).float(), part.amax(1).float(), 4, torch.float32)
        inverse = torch.linalg.inv(damped[column:, column:])
        found[:, column] = nearest_levels(weight[:, column].float(), scale, zero, 4) * scale.double() + zero.double()
        error = (weight[:, column] - found[:, column]) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("columns", [256, 167, 5])
def test_compensation_is_that_of_the_paper(columns: int, group: int) -> None:
    """Blocks of 128 columns, several groups in one, tails, and a group wider than the row."""
    x, weight = correlated(900, columns), torch.randn(24, columns, generator=torch.Generator().manual_seed(6))
    gram = (x.T @ x).double()
    found = unpack(quantise_weight(weight, bits=4, group_size=group, gram=gram), dtype=torch.float32)
    # fp32's rounding moves ranges by about 1e-6, and now and then a weight over the middle of a step; here: none
    close = (found - textbook(weight, gram, group)).abs() < 1e-4
    assert close.float().mean() > 0.998


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", [{}, {"clip": True}, {"clip": True, "gram": True}])
def test_symmetric_steps_have_zero_among_them(options, bits: int) -> None:
    weight = torch.randn(16, 70, generator=torch.Generator().manual_seed(7)).bfloat16()
    x = correlated(400, 70)
    given = options | ({"gram": x.T @ x} if "gram" in options else {})
    packed = quantise_weight(weight, bits=bits, group_size=32, symmetric=True, **given)
    assert torch.equal(packed.zero, -{8: 0, 4: 8}[bits] * packed.scale)
    lost = (unpack(packed, dtype=torch.float32) - weight.float()).square().mean()
    assert lost < {8: 1e-4, 4: 2e-2}[bits]  # measured: up to 3e-5 and 8e-3; a step of 4 bits is 0.3 wide
    if not options:
        ends = weight.float()[:, :32].abs().amax(1) * 2 / {8: 255, 4: 15}[bits]
        assert torch.equal(packed.scale[:16, 0], ends.bfloat16())


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(7), r"gram: expected shape \(8, 8\) for 8 inputs, got \(7, 7\)"),
        (torch.eye(8) - 2 * torch.ones(8, 8).triu(1), "gram: expected a positive semi-definite matrix"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise_weight(torch.randn(4, 8), bits=4, group_size=32, gram=gram)


def test_pieces_of_a_search_change_nothing(monkeypatch) -> None:
    values = torch.randn(50, 3, 32, generator=torch.Generator().manual_seed(8))
    whole = searched_scale_and_zero(values, 4, torch.float32)
    monkeypatch.setattr("saap.clip_search.PIECE", 700)
    assert all(map(torch.equal, searched_scale_and_zero(values, 4, torch.float32), whole))
