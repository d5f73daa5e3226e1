"""Ranges of quantisation groups that lose least: narrower ones than from the least to the largest weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from saap_kernels.group_quantise import nearest_levels, scale_and_zero

SHRINKS = tuple(1 - 0.05 * step for step in range(11))  # of the whole range, 1 to 0.5
Over = Callable[[Tensor, Tensor, int, torch.dtype], tuple[Tensor, Tensor]]  # (low, high, bits, dtype)
PIECE = 1 << 19  # weights that are searched at a time: they stay in a CPU's caches over all trials


def searched_scale_and_zero(
    values: Tensor, bits: int, dtype: torch.dtype, importance: Tensor | None = None, over: Over = scale_and_zero
) -> tuple[Tensor, Tensor]:
    """Scale and zero (..., G) of groups ``values`` (N, ..., G, g), fp32, by the least sum of squared errors.

    Both ends of a group's range shrink together, by one of ``SHRINKS``; weights beyond them become the nearest step.
    ``importance`` (G, g) weighs the squared errors, such as the mean square of each input;
    ``over`` makes scale and zero of both ends. The search of OmniQuant's
    and AWQ's clipping, by trial instead of by gradient.
    """
    pieces = values.split(max(1, PIECE * len(values) // max(1, values.numel())))
    found = [_searched(piece, bits, dtype, importance, over) for piece in pieces]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _searched(
    values: Tensor, bits: int, dtype: torch.dtype, importance: Tensor | None, over: Over
) -> tuple[Tensor, Tensor]:
    low, high = values.amin(-1), values.amax(-1)
    best_scale, best_zero = over(low, high, bits, dtype)
    best = _error(values, best_scale, best_zero, bits, importance)
    for shrink in SHRINKS[1:]:
        scale, zero = over(low * shrink, high * shrink, bits, dtype)
        error = _error(values, scale, zero, bits, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _error(values: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    scale, zero = scale[..., None], zero[..., None]
    lost = (nearest_levels(values, scale, zero, bits) * scale.float() + zero.float() - values).square()
    return (lost if importance is None else lost * importance).sum(-1)
