"""Backward elimination against least squares solved anew from nothing for every set that could be gone."""

import pytest
import torch
from torch import Tensor

from saap import backward_elimination
from saap.backward_elimination import costs_in_turn


def problem(units: int, size: int, outputs: int = 5, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A damped Gram matrix of correlated inputs, weights and losses, float64."""
    generator = torch.Generator().manual_seed(seed)
    features = units * size
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mix
    gram = inputs.T @ inputs
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    weight = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    return gram, weight, torch.rand(units, generator=generator, dtype=torch.float64) + 0.1


def missed(gram: Tensor, weight: Tensor, gone: list[int], size: int) -> float:
    """min over V of tr((W - V) G (W - V)') for V whose columns of ``gone`` are zero."""
    if not gone:
        return 0.0
    features = torch.tensor([unit * size + k for unit in range(len(gram) // size) for k in range(size) if unit in gone])
    stays = torch.tensor([k for k in range(len(gram)) if k not in features.tolist()], dtype=torch.long)
    new = torch.zeros_like(weight)
    new[:, stays] = torch.linalg.solve(gram[stays][:, stays], gram[stays] @ weight.T).T
    return float((((weight - new) @ gram) * (weight - new)).sum())


@pytest.mark.parametrize(("units", "size"), [(7, 1), (5, 3)])
def test_each_removal_costs_what_solving_anew_cannot_give_back(units: int, size: int) -> None:
    gram, weight, losses = problem(units, size)
    alone = [
        float(((weight[:, s] @ gram[s, s]) * weight[:, s]).sum())
        for s in (slice(unit * size, (unit + 1) * size) for unit in range(units))
    ]
    gone: list[int] = []
    wanted = torch.zeros(units, dtype=torch.float64)
    highest = 0.0
    while len(gone) < units:
        before = missed(gram, weight, gone, size)
        costs = {
            unit: float(losses[unit]) * (missed(gram, weight, [*gone, unit], size) - before) / alone[unit]
            for unit in range(units)
            if unit not in gone
        }
        gone.append(min(costs, key=costs.__getitem__))
        highest = max(highest, costs[gone[-1]])
        wanted[gone[-1]] = highest
    found = costs_in_turn(gram, weight, losses)
    # float64, a Gram matrix of condition 1e5 or so, inverted and downdated a few times
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=0)
    assert found.sort().indices.tolist() == gone


def test_units_that_explain_nothing_of_each_other_keep_their_losses() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    found = costs_in_turn(torch.diag(torch.tensor([1.0, 5.0, 9.0]).double()), torch.ones(4, 3), losses)
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)


def test_of_twins_one_goes_for_nothing_and_the_other_for_twice_the_output() -> None:
    """Both inputs are the same: what stays takes both weights, and its output has four times the energy."""
    gram = torch.ones(2, 2, dtype=torch.float64) + 1e-9 * torch.eye(2, dtype=torch.float64)
    found = costs_in_turn(gram, torch.ones(3, 2), torch.tensor([1.0, 1.5]))
    assert found[0] < 1e-8
    torch.testing.assert_close(found[1], torch.tensor(6.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_costs_rise_in_the_order_of_removal_where_a_later_unit_is_cheaper() -> None:
    """Weights of opposite sign on the same input: once one is gone, what is left of the other is worth nothing."""
    gram = torch.tensor([[1.0, 0.999], [0.999, 1.0]], dtype=torch.float64)
    found = costs_in_turn(gram, torch.tensor([[1.0, -1.0]]), torch.tensor([1.0, 1.001]))
    assert found.sort().indices.tolist() == [0, 1] and 0 < float(found[1] / found[0]) - 1 < 1e-12


def test_losses_that_are_not_positive_stay_and_go_first() -> None:
    gram, weight, losses = problem(6, 1)
    losses[2], losses[4] = -1.0, 0.0
    found = costs_in_turn(gram, weight, losses)
    assert found[2] == -1.0 and found[4] == 0.0 and found.sort().indices[:2].tolist() == [2, 4]


def test_many_units_go_in_rounds_that_charge_them_for_each_other(monkeypatch) -> None:
    """Twins are both among the cheapest of a round, yet only one of each pair may go for nothing."""
    gram, weight, losses = problem(30, 1, tokens=2000)
    twins = torch.arange(30).repeat_interleave(2)
    gram, weight, losses = gram[twins][:, twins], weight[:, twins], losses[twins]
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(60, dtype=torch.float64)
    one_by_one = costs_in_turn(gram, weight, losses)
    monkeypatch.setattr(backward_elimination, "ROUNDS", 6)
    rounds = costs_in_turn(gram, weight, losses)
    for found in (one_by_one, rounds):
        cheaper, dearer = found.view(30, 2).sort(1).values.T
        assert cheaper.max() < 1e-3 * dearer.min()
    assert not torch.equal(one_by_one, rounds)
    # what waits may cost up to half as much again as what goes before it; then costs add up to much the same
    assert 1 / 1.5 < float(rounds.sum() / one_by_one.sum()) < 1.5


def test_a_single_unit_keeps_its_loss() -> None:
    assert costs_in_turn(torch.eye(2).double(), torch.ones(3, 2), torch.tensor([2.0])).tolist() == [2.0]
