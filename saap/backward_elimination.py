"""Backward elimination: what removing units costs, one after another, when those that stay make up for each."""

import math

import torch
from torch import Tensor

ROUNDS = 256  # of a Linear, or more where units explain each other
SLACK = 1.5  # times what a unit outside the round costs, up to which one in it may cost when its turn comes


def costs_in_turn(gram: Tensor, weight: Tensor, losses: Tensor) -> Tensor:
    """What every unit's removal still costs in its turn, (U,) float64, cheapest first.

    Inputs of a Linear with ``weight`` (D, K) have the damped Gram matrix ``gram`` (K, K), positive definite; each of
    the U units owns K / U consecutive ones. Removing a unit alone, with nothing to make up for it, costs ``losses``
    (U,) and misses the damped energy tr(W_u G_uu W_u') of its output. When the weights of the inputs that stay are
    solved anew, tr(V_u (P_uu)^-1 V_u') is missed, P the inverse of the Gram matrix of all that is left and V the
    weights as solved so far: removal costs the loss times the quotient, which is at most 1 at first and may exceed
    it for a unit that carries what went before. The cheapest unit goes, P and V are brought up to date, and so
    on to the last. Costs are made to rise in that order, so that ranking by them is removing in turn. Losses that
    are not positive stay as they are.

    Many units go in rounds: the cheapest of them are taken in turn among themselves, and those that have become dear
    by it wait; the others are brought up to date once a round.

    The energy missed is the saliency of the optimal brain surgeon (Hassibi and Stork 1993, equation 5), with units for
    weights and a Linear's inputs for the Hessian, as in ZipLM (Kurtic et al., arXiv 2302.04089).
    """
    count, size = len(losses), len(gram) // len(losses)
    weight, losses = weight.double(), losses.double().to(gram.device)
    rows = weight.T.reshape(count, size, -1)
    alone = ((_diagonal_blocks(gram, size) @ rows) * rows).sum((1, 2))
    rates = torch.where((alone > 0) & (losses > 0), losses / alone, torch.nan)  # where there is none losses stay
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    left, found, turn = torch.arange(count, device=gram.device), torch.empty_like(losses), []
    while len(left):
        cost, order = _costs(inverse, weight, rates[left], losses[left]).sort(stable=True)
        most = -(-count // ROUNDS)
        limit = SLACK * float(cost[most]) if most < len(left) else math.inf
        chosen = order[:most].sort().values
        inputs = (chosen[:, None] * size + torch.arange(size, device=gram.device)).flatten()
        own = left[chosen]
        taken, costs = _take(inverse[inputs][:, inputs], weight[:, inputs], rates[own], losses[own], limit)
        found[own[taken]] = costs
        turn.append(own[taken])
        stays = torch.ones(len(left), dtype=torch.bool, device=gram.device)
        stays[chosen[taken]] = False
        inverse, weight = _without(inverse, weight, stays)
        left = left[stays]
    order = torch.cat(turn)
    rising = found[order].cummax(0).values
    found[order] = rising + rising.abs() * torch.arange(count, device=gram.device) * torch.finfo(rising.dtype).eps
    return found


def _take(inverse: Tensor, weight: Tensor, rates: Tensor, losses: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Units of one round in the order in which they go, the first in any case, and what they cost: (n,) both.

    ``inverse`` and ``weight`` are of the round's own inputs; ends at the first unit that costs more than ``limit``.
    """
    taken: list[Tensor] = []
    costs: list[Tensor] = []
    left = torch.arange(len(rates), device=rates.device)
    while len(left):
        cost = _costs(inverse, weight, rates[left], losses[left])
        first = cost.sort(stable=True).indices[0]  # of equal ones the lower index
        if taken and cost[first] > limit:
            break
        taken.append(left[first])
        costs.append(cost[first])
        stays = torch.arange(len(left), device=rates.device) != first
        inverse, weight = _without(inverse, weight, stays)
        left = left[stays]
    return torch.stack(taken), torch.stack(costs)


def _costs(inverse: Tensor, weight: Tensor, rates: Tensor, losses: Tensor) -> Tensor:
    """What removing each of U units next costs, (U,): its rate times tr(V_u (P_uu)^-1 V_u')."""
    size = len(inverse) // len(rates)
    if size == 1:
        missed = weight.square().sum(0) / inverse.diagonal()
    else:
        rows = weight.T.reshape(len(rates), size, -1)
        missed = (torch.linalg.solve(_diagonal_blocks(inverse, size), rows) * rows).sum((1, 2))
    return torch.where(rates.isnan(), losses, rates * missed)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """(U size, U size) -> (U, size, size), a view."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _without(inverse: Tensor, weight: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse (K', K') and the weights (D, K'), solved anew, of the units that stay, (U,) bool."""
    kept = stays.repeat_interleave(len(inverse) // len(stays))
    kept, gone = kept.nonzero().flatten(), (~kept).nonzero().flatten()
    beside = inverse[gone][:, kept]
    solved = torch.linalg.solve(inverse[gone][:, gone], beside)
    return inverse[kept][:, kept] - beside.T @ solved, weight[:, kept] - weight[:, gone] @ solved
