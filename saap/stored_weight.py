"""How checkpoints of quant_method "saap" store one quantised weight: exact sizes, nothing of a kernel's layout.

Of a Linear NAME with weight (N, K) and G = ceil(K / group_size) groups along a row, the last one shorter:
``NAME.qweight`` int8 (N, K) of -128 to 127 for 8 bits, uint8 (N, ceil(K / 2)) for 4 bits, where the low half of byte j
is column 2 j and the high half column 2 j + 1, of 0 to 15, zero beyond K; ``NAME.qscale`` and ``NAME.qzero`` (N, G)
in the model's dtype. W = qscale * Q + qzero.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saap_kernels import PackedWeight
from saap_kernels.packed import LINE, QUANTISED_LINE, from_nibbles, pack_quantised, round_up

METHOD = "saap"
NAMES = ("qweight", "qscale", "qzero")
GROUPS = (32, 64, 128)


def stored_shapes(shape: tuple[int, int], bits: int, group_size: int) -> dict[str, tuple[int, int]]:
    """{name: shape} of the three tensors of a weight (N, K)."""
    rows, columns = shape
    groups = -(-columns // group_size)
    return {
        "qweight": (rows, columns if bits == 8 else -(-columns // 2)),
        "qscale": (rows, groups),
        "qzero": (rows, groups),
    }


def to_stored(packed: PackedWeight) -> dict[str, Tensor]:
    """The three tensors of a quantised ``packed`` (N, K), exact."""
    assert packed.scale is not None and packed.zero is not None
    rows, columns = packed.shape
    data = from_nibbles(packed.data) if packed.bits == 4 else packed.data
    quantised = data[:rows, :columns]
    if packed.bits == 4:
        low, high = F.pad(quantised, (0, columns % 2)).unflatten(-1, (-1, 2)).unbind(-1)
        quantised = low | (high << 4)
    return {
        "qweight": quantised.contiguous(),
        "qscale": packed.scale[:rows].contiguous(),
        "qzero": packed.zero[:rows].contiguous(),
    }


def from_stored(stored: dict[str, Any], columns: int, bits: int, group_size: int) -> PackedWeight:
    """The packed weight (N, ``columns``) of three stored tensors; the inverse of ``to_stored``, exact."""
    quantised = stored["qweight"]
    if bits == 4:
        quantised = torch.stack([quantised & 15, quantised >> 4], -1).flatten(-2)[:, :columns]
    return pack_quantised(quantised, stored["qscale"], stored["qzero"], bits=bits, group_size=group_size)


def empty_packed(shape: tuple[int, int], bits: int, group_size: int, dtype: torch.dtype) -> PackedWeight:
    """A packed weight (N, K) on the meta device, scale and zero of ``dtype``: sizes without values."""
    rows, columns = shape
    height, pitch = round_up(rows, LINE), round_up(columns, QUANTISED_LINE) // (8 // bits)
    data = torch.empty(height, pitch, dtype=torch.int8 if bits == 8 else torch.uint8, device="meta")
    scale = torch.empty(height, -(-columns // group_size), dtype=dtype, device="meta")
    return PackedWeight(data, shape, bits, group_size, scale, torch.empty_like(scale))
