"""A low-rank change of a quantised weight's levels, Q' = clamp(round(Q + up down / scale)), and what it multiplies.

N out features, K in features, r rank, G groups. One pass over the weight, in C++ on a CPU and in Triton on a GPU,
else plain torch; which of them runs depends on devices and dtypes alone, so that the same factors always give the same
levels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from saap_kernels import _ext
from saap_kernels.backend import requested
from saap_kernels.cpu_linear import SCALE_DTYPES, described
from saap_kernels.group_quantise import LEVELS
from saap_kernels.packed import LINE, PackedWeight, from_nibbles, round_up, unpacked

PANEL_ELEMENTS = 1 << 20  # of rows written out at once: 4 MiB of fp32; on a GPU sixteen times that


class Change(NamedTuple):
    """``up`` (N, r) and ``down`` (r, K) of one floating-point dtype."""

    up: Tensor
    down: Tensor


def moved_levels(packed: PackedWeight, change: Change) -> Tensor:
    """Q' (N, K), whole numbers within the bits of ``packed`` (N, K), in the dtype of ``change`` (fp64 at most)."""
    if _triton_runs(packed, change):
        return _triton_rows(packed, change, False, torch.float32)[: packed.rows, : packed.columns]
    if _native_runs(packed, change):
        buffer = torch.empty(packed.rows, round_up(packed.columns, LINE))
        return _native_rows(packed, change, slice(0, packed.rows), False, buffer)
    step = panel_rows(packed)
    return torch.cat([_torch_levels(packed, change, rows) for rows in _ranges(packed.rows, step)])


def panels(packed: PackedWeight, change: Change | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their values (rows, K) in ``dtype``) of a quantised ``packed`` (N, K), its levels moved by ``change``.

    A panel of values may be overwritten by the next one.
    """
    native = _native_runs(packed, change) and dtype != torch.float64
    buffer = torch.empty(panel_rows(packed), round_up(packed.columns, LINE)) if native else None
    for rows in _ranges(packed.rows, panel_rows(packed)):
        if buffer is not None:
            values = _native_rows(packed, change, rows, True, buffer)
        elif change is None:
            values = unpacked(_part(packed, rows), dtype)[:, : packed.columns]
        else:
            assert packed.scale is not None and packed.zero is not None
            scale, zero = (_by_column(each[rows].float(), packed) for each in (packed.scale, packed.zero))
            values = scale.mul_(_torch_levels(packed, change, rows)).add_(zero)  # in fp32 with two roundings, as unpack
        yield rows, values.to(dtype)


def written_out(packed: PackedWeight, change: Change | None, dtype: torch.dtype) -> Tensor:
    """The whole of ``panels``, padded: (N rounded up to 64, K rounded up to 64), zero beyond N and K."""
    if dtype != torch.float64 and _triton_runs(packed, change):
        return _triton_rows(packed, change, True, dtype)
    shape = round_up(packed.rows, LINE), round_up(packed.columns, LINE)
    result = torch.zeros(shape, dtype=dtype, device=packed.data.device)
    for rows, values in panels(packed, change, dtype):
        result[rows, : packed.columns] = values
    return result


def panel_rows(packed: PackedWeight) -> int:
    """Rows that are written out at once."""
    most = PANEL_ELEMENTS * (16 if packed.data.is_cuda else 1)
    return min(packed.rows, max(LINE, most // packed.columns))


def _torch_levels(packed: PackedWeight, change: Change, rows: slice) -> Tensor:
    """Of some rows: the definition."""
    assert packed.scale is not None
    steps, lowest = LEVELS[packed.bits]
    stored = packed.data[rows]
    data = (from_nibbles(stored) if packed.bits == 4 else stored)[:, : packed.columns]
    moved = change.up[rows] @ change.down  # [rows, K]
    scale = packed.scale[rows].to(moved.dtype)
    inverse = _by_column(torch.where(scale > 0, scale, torch.inf), packed)  # a group of one value has no steps
    return moved.div_(inverse).add_(data).round_().clamp_(lowest, lowest + steps)


def _by_column(values: Tensor, packed: PackedWeight) -> Tensor:
    """(rows, G) -> (rows, K)."""
    return values.repeat_interleave(packed.group_size or 1, -1)[:, : packed.columns]


def _part(packed: PackedWeight, rows: slice) -> PackedWeight:
    assert packed.scale is not None and packed.zero is not None
    shape = rows.stop - rows.start, packed.columns
    return PackedWeight(packed.data[rows], shape, packed.bits, packed.group_size, packed.scale[rows], packed.zero[rows])


def _ranges(count: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _native_runs(packed: PackedWeight, change: Change | None) -> bool:
    asked = packed.data.is_cpu and requested() in (None, "cpu")
    return asked and _in_fp32(packed, change) and _ext.native() is not None


def _triton_runs(packed: PackedWeight, change: Change | None) -> bool:
    asked = packed.data.is_cuda and requested() in (None, "triton", "cuda")
    return asked and _in_fp32(packed, change) and _ext.triton_status()[0]


def _in_fp32(packed: PackedWeight, change: Change | None) -> bool:
    kept = packed.scale is not None and packed.scale.dtype in SCALE_DTYPES
    return kept and (change is None or change.up.dtype == change.down.dtype == torch.float32)


def _triton_rows(packed: PackedWeight, change: Change | None, values: bool, dtype: torch.dtype) -> Tensor:
    from saap_kernels.triton_moved import moved  # there may be no Triton

    shape = round_up(packed.rows, LINE), round_up(packed.columns, LINE)
    result = torch.empty(shape, dtype=dtype, device=packed.data.device)
    up, down = (None, None) if change is None else change
    return moved(packed, up, down, values, result)


def _native_rows(packed: PackedWeight, change: Change | None, rows: slice, values: bool, buffer: Tensor) -> Tensor:
    """``rows`` of the values, or of the levels, in ``buffer`` (.., K rounded up to 64) fp32: a view (rows, K) of it."""
    native, count, width = _ext.native(), rows.stop - rows.start, buffer.shape[1]
    assert native is not None  # _native_runs made sure
    place = (rows.start, count, buffer.data_ptr(), width, torch.get_num_threads())
    if change is None:
        native.unpack_rows_f32(described(packed), *place)
    else:
        up = change.up.contiguous()
        down = functional.pad(change.down, (0, width - packed.columns)).contiguous()
        native.moved_rows_f32(
            described(packed), up.data_ptr(), down.data_ptr(), width, len(down), *place[:2], values, *place[2:]
        )
    return buffer[:count, : packed.columns]
