"""Sizes of the weights that each unit and each input feature owns, for criteria that weigh by them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from saap.families import Projection
from saap.host import on_host
from saap.units import IN_PARTS, LayerUnits

PANEL = 64  # rows that a CPU reads at a time


def by_unit(lines: Tensor, sizes: LayerUnits, part: str) -> Tensor:
    """(lines,) of rows or columns -> (U,) sums over each unit of a part."""
    return lines.view(-1, sizes.rows_per_unit(part)).sum(1)


def line_norms(projections: Iterable[tuple[str, Projection]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum of |w| and of w^2 of each row, its bias included, or of each column of o and down, of a layer's parts.

    Those of a part that comes several times, of one expert after another, follow each other.

    Summed in fp32 (float64 weights in float64) along each line, on a CPU in panels whose sums add up in float64. On a
    device a weight is read twice, without a copy of it; everything comes over in one transfer.
    """
    named = list(projections)
    moved = on_host([norm for part, projection in named for norm in _norms(projection, part)])
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for (part, _), l1, square in zip(named, moved[::2], moved[1::2], strict=True):
        for norms, norm in zip(found.setdefault(part, ([], [])), (l1, square), strict=True):
            norms.append(norm)
    return {part: (torch.cat(l1), torch.cat(square)) for part, (l1, square) in found.items()}


@torch.no_grad()
def _norms(projection: Projection, part: str) -> tuple[Tensor, Tensor]:
    along = 0 if part in IN_PARTS else 1
    l1, square = (_in_panels if projection.weight.device.type == "cpu" else _whole)(projection.weight, along)
    if along and projection.bias is not None:
        bias = projection.bias.double()
        l1, square = l1 + bias.abs(), square + bias.square()
    return l1, square


def _in_panels(weight: Tensor, along: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    panel = torch.empty(min(PANEL, len(weight)), weight.shape[1], dtype=dtype)  # stays in a core's cache
    l1, square = [], []
    for rows in weight.split(PANEL):
        values = panel[: len(rows)].copy_(rows).abs_()
        l1.append(values.sum(along).double())
        square.append(values.square_().sum(along).double())
    if along:
        return torch.cat(l1), torch.cat(square)
    return torch.stack(l1).sum(0), torch.stack(square).sum(0)


def _whole(weight: Tensor, along: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)  # torch's kernels read 16 bits and add in 32
    l1, root = (torch.linalg.vector_norm(weight, order, along, dtype=dtype) for order in (1, 2))
    return l1.double(), root.double().square()
