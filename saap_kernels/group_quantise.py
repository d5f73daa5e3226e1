"""Quantisation in groups along a row: W = scale * Q + zero, Q of -128 to 127 (8 bits) or 0 to 15 (4 bits)."""

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = {8: (255, -128), 4: (15, 0)}  # {bits: steps, lowest Q}
STORED = {8: torch.int8, 4: torch.uint8}


def round_up(count: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


def grouped(values: Tensor, group: int) -> Tensor:
    """(..., K) -> (..., ceil(K / group), group); the last group repeats its last value, which changes no range."""
    columns = values.shape[-1]
    width = min(group, columns)
    padded = functional.pad(values, (0, round_up(columns, width) - columns), mode="replicate")
    return padded.unflatten(-1, (-1, width))


def scale_and_zero(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of groups whose values go from ``low`` to ``high``, fp32, in ``dtype``; infinite where that is too small."""
    steps, lowest = LEVELS[bits]
    scale = ((high - low) / steps).to(dtype)
    # rounded up, so that the steps reach the largest weight
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.float() * steps < high - low, above, scale)
    zero = (low - lowest * scale.float()).to(dtype)
    return scale, zero


def check_ranges(weight: Tensor, scale: Tensor, zero: Tensor) -> None:
    """Raise ValueError where the dtype of scale and zero does not hold the ranges of ``weight``."""
    if not bool(scale.isfinite().all() & zero.isfinite().all()):
        largest = float(weight.abs().max())
        raise ValueError(f"weight: expected groups whose range fits {scale.dtype}, got values up to {largest:.3g}")


def nearest_levels(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Q, fp32, of fp32 ``values`` by a scale and zero of any dtype that broadcast against them."""
    steps, lowest = LEVELS[bits]
    safe = torch.where(scale > 0, scale.float(), 1.0)
    return ((values - zero.float()) / safe).round_().clamp_(lowest, lowest + steps)


def quantised_in_groups(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q as int8 (bits 8) or uint8 (..., N, K); scale and zero (..., N, ceil(K / group)) in the dtype to keep.

    The steps of a group go from its least to its largest weight.
    """
    values = grouped(weight.float(), group)
    scale, zero = scale_and_zero(values.amin(-1), values.amax(-1), bits, kept_dtype(weight.dtype))
    check_ranges(weight, scale, zero)
    levels = nearest_levels(values, scale[..., None], zero[..., None], bits)
    return levels.flatten(-2)[..., : weight.shape[-1]].to(STORED[bits]), scale, zero


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of scale and zero of weights of ``dtype``."""
    return torch.float32 if dtype == torch.float64 else dtype
