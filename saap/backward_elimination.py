"""Backward elimination: what removing units costs, one after another, when those that stay make up for each."""

import torch
from torch import Tensor

ROUNDS = 256  # of a Linear; units of one round go at once


def costs_in_turn(gram: Tensor, weight: Tensor, losses: Tensor) -> Tensor:
    """What every unit's removal still costs in its turn, (U,) float64, cheapest first.

    Inputs of a Linear with ``weight`` (D, K) have the damped Gram matrix ``gram`` (K, K), positive definite; each of
    the U units owns K / U consecutive ones. Removing a unit alone, with nothing to make up for it, costs ``losses``
    (U,). When the weights of the inputs that stay are solved anew, of a unit's output energy tr(W_u G_uu W_u') only
    tr(V_u (P_uu)^-1 V_u') is missed, P the inverse of the Gram matrix of all that is left and V the weights as
    solved so far: its removal costs that share of its loss. The cheapest unit goes, P and V are brought up to
    date, and so on to the last; in at most ``ROUNDS`` rounds, several units at once. Costs are made to rise in that
    order, so that ranking by them is removing in turn. Losses that are not positive stay as they are.

    The share is the saliency of the optimal brain surgeon (Hassibi and Stork 1993, equation 5), with units for
    weights and a Linear's inputs for the Hessian, as in ZipLM (Kurtic et al., arXiv 2302.04089).
    """
    count, size = len(losses), len(gram) // len(losses)
    weight, losses = weight.double(), losses.double().to(gram.device)
    alone = _energies(gram, weight, size)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    left, found, order = torch.arange(count, device=gram.device), torch.empty_like(losses), []
    while len(left):
        missed = _missed(inverse, weight, size)
        share = torch.where((alone[left] > 0) & (losses[left] > 0), missed / alone[left], 1.0)
        cost = losses[left] * share
        chosen = cost.sort(stable=True).indices[: -(-count // ROUNDS)]  # of equal ones the lower index first
        order.append(left[chosen])
        found[order[-1]] = cost[chosen]
        stays = torch.ones(len(left), dtype=torch.bool, device=gram.device)
        stays[chosen] = False
        inverse, weight = _without(inverse, weight, stays.repeat_interleave(size))
        left = left[stays]
    turn = torch.cat(order)
    rising = found[turn].cummax(0).values
    ties = rising.abs() * torch.arange(count, device=gram.device) * torch.finfo(rising.dtype).eps
    found[turn] = rising + ties
    return found


def _energies(gram: Tensor, weight: Tensor, size: int) -> Tensor:
    """tr(W_u G_uu W_u') of every unit, (U,)."""
    rows = weight.T.reshape(-1, size, len(weight))
    return ((_diagonal_blocks(gram, size) @ rows) * rows).sum((1, 2))


def _missed(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """tr(V_u (P_uu)^-1 V_u') of every unit, (U,)."""
    rows = weight.T.reshape(-1, size, len(weight))
    return (torch.linalg.solve(_diagonal_blocks(inverse, size), rows) * rows).sum((1, 2))


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """(U size, U size) -> (U, size, size), a view."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _without(inverse: Tensor, weight: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse (K', K') and the weights (D, K'), solved anew, of the inputs that stay, (K,) bool."""
    goes = ~stays
    beside = inverse[goes][:, stays]  # [gone, K']
    solved = torch.linalg.solve(inverse[goes][:, goes], beside)
    return inverse[stays][:, stays] - beside.T @ solved, weight[:, stays] - weight[:, goes] @ solved
