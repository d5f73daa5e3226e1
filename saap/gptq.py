"""One Linear's weight in groups of few bits: by ranges alone, by a search of ranges, or with error compensation."""

import torch
from torch import Tensor

from saap.clip_search import searched_scale_and_zero
from saap_kernels import PackedWeight, pack_quantised
from saap_kernels.group_quantise import (
    STORED,
    check_ranges,
    grouped,
    kept_dtype,
    nearest_levels,
    scale_and_zero,
)

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, GPTQ's


def quantise_weight(
    weight: Tensor, *, bits: int, group_size: int, clip: bool = False, gram: Tensor | None = None
) -> PackedWeight:
    """``weight`` (N, K) quantised to W = scale * Q + zero in groups of ``group_size`` along each row.

    Ranges go from the least to the largest weight of a group or, with ``clip``, to where the squared error is least.
    With ``gram`` (K, K), the sum of x x' over calibration tokens, columns are quantised one after another and what
    each one loses is made up for by those behind it, so that ||X (W - W~)'||^2 is small (GPTQ, arXiv 2210.17323,
    without its ordering of columns, which would break the groups); the ranges of a group are then those of the
    weights as they have become when its turn comes. Inputs that are always zero are left out of it.
    Raises ValueError for weights whose ranges do not fit their dtype and for a Gram matrix that is not finite.
    """
    importance = None if gram is None else gram.diagonal().float()
    if gram is None:
        levels, scale, zero = _by_range(weight.float(), weight.dtype, bits, group_size, clip, importance)
    else:
        levels, scale, zero = _compensated(weight, bits, group_size, clip, gram)
    check_ranges(weight, scale, zero)
    return pack_quantised(levels.to(STORED[bits]), scale, zero, bits=bits, group_size=group_size)


def _by_range(
    values: Tensor, dtype: torch.dtype, bits: int, group_size: int, clip: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Q (N, K), scale and zero (N, G) of fp32 weights; ``importance`` (K,)."""
    groups, kept = grouped(values, group_size), kept_dtype(dtype)
    if clip:
        # columns that only fill up the last group count nothing
        weights = torch.ones_like(values[0]) if importance is None else importance
        filled = torch.nn.functional.pad(weights, (0, groups[0].numel() - len(weights)))
        scale, zero = searched_scale_and_zero(groups, bits, kept, filled.view(groups.shape[-2:]))
    else:
        scale, zero = scale_and_zero(groups.amin(-1), groups.amax(-1), bits, kept)
    levels = nearest_levels(groups, scale[..., None], zero[..., None], bits).flatten(-2)[..., : values.shape[-1]]
    return levels, scale, zero


def _compensated(weight: Tensor, bits: int, group_size: int, clip: bool, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = weight.float().clone()
    columns = values.shape[1]
    factor, importance = _inverse_factor(gram)
    factor = factor.to(values)
    levels, scales, zeros = torch.empty_like(values), [], []
    for start in range(0, columns, group_size):
        stop = min(start + group_size, columns)
        part = importance[start:stop].to(values)
        _, scale, zero = _by_range(values[:, start:stop], weight.dtype, bits, group_size, clip, part)
        scales.append(scale)
        zeros.append(zero)
        errors = values.new_empty(len(values), stop - start)
        for column in range(start, stop):
            own = values[:, column : column + 1]
            found = nearest_levels(own, scale, zero, bits)
            lost = (own - (found * scale.float() + zero.float())) / factor[column, column]
            values[:, column:stop] -= lost * factor[column, column:stop]
            levels[:, column : column + 1], errors[:, column - start : column - start + 1] = found, lost
        values[:, stop:] -= errors @ factor[start:stop, stop:]
    return levels, torch.cat(scales, -1), torch.cat(zeros, -1)


def _inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the inverse of the damped Gram matrix, float64, and its diagonal before damping.

    Inputs that are always zero are independent of the others in it.
    """
    if not bool(gram.isfinite().all()):
        raise ValueError("gram: expected a finite matrix, got NaN or infinity")
    damped = gram.double().clone()
    diagonal = damped.diagonal()
    importance = diagonal.clone()
    mean = float(diagonal[diagonal > 0].mean()) if bool((diagonal > 0).any()) else 1.0
    diagonal += DAMPING * mean
    diagonal[importance == 0] = mean
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True), importance
