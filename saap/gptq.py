"""One Linear's weight in groups of few bits: by ranges alone, by a search of ranges, or with error compensation."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from saap.clip_search import searched_scale_and_zero
from saap_kernels import PackedWeight, pack_quantised
from saap_kernels.group_quantise import (
    LEVELS,
    STORED,
    check_ranges,
    grouped,
    kept_dtype,
    nearest_levels,
    scale_and_zero,
)

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, GPTQ's
BLOCK = 128  # columns whose errors reach those behind them in one product: a multiple of every group size


@dataclass(frozen=True)
class Grid:
    """The steps of groups of ``group_size`` weights along a row, for weights of ``dtype``.

    ``clip`` searches the part of a group's range that they cover; ``symmetric`` ones lie evenly around zero, which is
    one of them (zero = -8 * scale with 4 bits).
    """

    bits: int
    group_size: int
    dtype: torch.dtype
    clip: bool
    symmetric: bool

    def steps(self, values: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero (N, G) for fp32 ``values`` (N, K); ``importance`` (K,) weighs squared errors."""
        groups, kept = grouped(values, self.group_size), kept_dtype(self.dtype)
        over = symmetric_scale_and_zero if self.symmetric else scale_and_zero
        if not self.clip:
            return over(groups.amin(-1), groups.amax(-1), self.bits, kept)
        # columns that only fill up the last group count nothing
        weights = torch.ones_like(values[0]) if importance is None else importance
        filled = functional.pad(weights, (0, groups[0].numel() - len(weights)))
        return searched_scale_and_zero(groups, self.bits, kept, filled.view(groups.shape[-2:]), over)


def symmetric_scale_and_zero(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As ``scale_and_zero``, of steps around zero that go to the larger end; half a step of it may be cut off."""
    steps, lowest = LEVELS[bits]
    scale = (torch.maximum(low.abs(), high.abs()) * 2 / steps).to(dtype)
    return scale, -(lowest + (steps + 1) // 2) * scale


def quantise_weight(
    weight: Tensor, *, bits: int, group_size: int, clip: bool = False, gram: Tensor | None = None,
    symmetric: bool = False,
) -> PackedWeight:  # fmt: skip
    """``weight`` (N, K) quantised to W = scale * Q + zero in groups of ``group_size`` along each row.

    Ranges go from the least to the largest weight of a group or, with ``clip``, to where the squared error is least,
    weighed by the Gram matrix's diagonal if there is one. With ``gram`` (K, K), the sum of x x' over calibration
    tokens, columns are quantised one after another and what each one loses is made up for by those behind it, so that
    ||X (W - W~)'||^2 is small (GPTQ, arXiv 2210.17323, without its ordering of columns, which would break the groups);
    the ranges of a group are then those of the weights as they have become when its turn comes. Inputs that are always
    zero are left out of it. ``symmetric`` makes zero a step, the middle one.
    Raises ValueError for weights whose ranges do not fit their dtype and for a Gram matrix of another size, not finite,
    or not of any inputs.
    """
    grid = Grid(bits, group_size, weight.dtype, clip, symmetric)
    levels, scale, zero = _by_range(weight.float(), grid) if gram is None else _compensated(weight, grid, gram)
    check_ranges(weight, scale, zero)
    return pack_quantised(levels.to(STORED[bits]), scale, zero, bits=bits, group_size=group_size)


def _by_range(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Q (N, K), scale and zero (N, G) of fp32 weights."""
    scale, zero = grid.steps(values, None)
    levels = nearest_levels(grouped(values, grid.group_size), scale[..., None], zero[..., None], grid.bits)
    return levels.flatten(-2)[..., : values.shape[-1]], scale, zero


def _compensated(weight: Tensor, grid: Grid, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q (N, K), scale and zero (N, G).

    Of the factor R of ``_factor``, ||X D'||^2 is the sum over columns c of |sum over j <= c of R[j, c] D[:, j]|^2 for
    D = W - W~. Columns behind c can make all but the terms up to c vanish, so each one is rounded from what makes its
    own term zero: W[:, c] + sum over j < c of R[j, c] / R[c, c] D[:, j]. That is GPTQ's update with one factorisation
    instead of an inverse (arXiv 2507.18553). Columns are rows here, so that each is one piece of memory.
    """
    rows, columns = weight.shape
    lower, importance = _factor(gram, columns)
    lower, importance = lower.to(weight.device), importance.to(weight.device, torch.float32)
    levels = weight.new_empty((columns, rows), dtype=STORED[grid.bits])
    carried = torch.zeros((columns, rows), device=weight.device)  # what the columns in front hand over
    scales, zeros = [], []
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        own = weight[:, first:last].float().T.contiguous()  # [B, N]
        values, lost = own + carried[first:last], torch.empty_like(own)
        among = _handed_over(lower, first, last, first, last)  # [B, B]
        for start in range(0, last - first, grid.group_size):
            part = slice(start, min(start + grid.group_size, last - first))
            # what the group becomes if nothing more is lost in it: its columns make up for one another too
            handed = torch.linalg.solve_triangular(
                among[part, part].T, values[part] - own[part], upper=False, unitriangular=True
            )
            scale, zero = grid.steps((own[part] + handed).T, importance[first:last][part])
            _round(values[part], own[part], among[part, part], scale[:, 0], zero[:, 0], grid.bits, lost[part])
            levels[first:last][part] = values[part].to(STORED[grid.bits])
            values[part.stop :].addmm_(among[part, part.stop :].T, lost[part])
            scales.append(scale)
            zeros.append(zero)
        if last < columns:
            carried[last:].addmm_(_handed_over(lower, first, last, last, columns).T, lost)
    return levels.T, torch.cat(scales, -1), torch.cat(zeros, -1)


def _round(
    values: Tensor, own: Tensor, among: Tensor, scale: Tensor, zero: Tensor, bits: int, lost: Tensor
) -> None:  # fmt: skip
    """Make ``values`` (g, N) of one group its levels, and ``lost`` (g, N) what these lack of the weights ``own``."""
    step, lowest = scale.float(), zero.float()
    for column in range(len(values)):
        value = values[column]
        if column:
            value.addmv_(lost[:column].T, among[:column, column])
        value.copy_(nearest_levels(value, scale, zero, bits))
        torch.sub(own[column], value * step + lowest, out=lost[column])


def _factor(gram: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The damped Gram matrix as R R' with R upper triangular, and the diagonal before damping; float64.

    R comes with rows and columns in reverse order, as a lower Cholesky factor. Inputs that are always zero are
    independent of the others in it.
    """
    if gram.shape != (columns, columns):
        raise ValueError(f"gram: expected shape {(columns, columns)} for {columns} inputs, got {tuple(gram.shape)}")
    if not bool(gram.isfinite().all()):
        raise ValueError("gram: expected a finite matrix, got NaN or infinity")
    damped = gram.flip(0, 1).double()
    diagonal = damped.diagonal()
    importance = diagonal.flip(0)
    mean = float(importance[importance > 0].mean()) if bool((importance > 0).any()) else 1.0
    diagonal += DAMPING * mean
    diagonal[importance.flip(0) == 0] = mean
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError("gram: expected a positive semi-definite matrix, got one with negative eigenvalues")
    return lower, importance


def _handed_over(lower: Tensor, first: int, last: int, start: int, stop: int) -> Tensor:
    """R[j, c] / R[c, c] for columns j of ``first`` to ``last`` and c of ``start`` to ``stop``, fp32."""
    whole = len(lower)
    part = lower[whole - last : whole - first, whole - stop : whole - start].flip(0, 1)
    return (part / lower.diagonal().flip(0)[start:stop]).float()
