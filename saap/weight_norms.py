"""Sizes of the weights that each unit and each input feature owns, for criteria that weigh by them."""

import torch
from torch import Tensor

from saap.families import Projection
from saap.units import IN_PARTS, LayerUnits


def by_unit(lines: Tensor, sizes: LayerUnits, part: str) -> Tensor:
    """(lines,) of rows or columns -> (U,) sums over each unit of a part."""
    return lines.view(-1, sizes.rows_per_unit(part)).sum(1)


def line_norms(projection: Projection, part: str, panel: int = 256) -> tuple[Tensor, Tensor]:
    """Sum of |w| and of w^2 of each row, its bias included, or of each column of o and down; float64 on the CPU."""
    weight = projection.weight.detach()
    zero = torch.zeros((), dtype=torch.float64, device=weight.device)
    if part in IN_PARTS:
        l1 = sum((rows.abs().sum(0, dtype=torch.float64) for rows in weight.split(panel)), start=zero)
        square = sum((rows.double().square().sum(0) for rows in weight.split(panel)), start=zero)
    else:
        l1 = torch.cat([rows.abs().sum(1, dtype=torch.float64) for rows in weight.split(panel)])
        square = torch.cat([rows.double().square().sum(1) for rows in weight.split(panel)])
        if projection.bias is not None:
            bias = projection.bias.detach().double()
            l1, square = l1 + bias.abs(), square + bias.square()
    return l1.cpu(), square.cpu()
