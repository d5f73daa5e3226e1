"""Sizes of the weights that each unit owns, for the magnitude criterion."""

import torch
from torch import Tensor

from saap.families import Projection
from saap.units import IN_PARTS, LayerUnits


def weight_norms(projection: Projection, sizes: LayerUnits, part: str, panel: int = 256) -> tuple[Tensor, Tensor]:
    """Sum of |w| and of w^2 per unit, (U,) each in float64, read in row panels; biases included for rows."""
    weight = projection.weight.detach()
    size = sizes.rows_per_unit(part)
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
    return l1.view(-1, size).sum(1).cpu(), square.view(-1, size).sum(1).cpu()
