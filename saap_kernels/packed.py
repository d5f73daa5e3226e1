"""Weights as the inference ops read them: rows padded to whole memory lines, or quantised in groups along a row."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saap_kernels.group_quantise import STORED, quantised_in_groups, round_up

VERSION = 1  # of the layout; ops refuse any other
BITS = (16, 8, 4)
LINE = 64  # elements: rows, and the pitch of 16-bit and 32-bit weights and of results, are multiples of it
QUANTISED_LINE = 128  # elements of a quantised row's pitch
BLOCK = 64  # int4: 32 bytes hold weights 0 to 31 of a block in their low halves and 32 to 63 in their high ones
GROUP = 128  # the default group
GROUP_MULTIPLE = 32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PackedWeight:
    """A Linear's weight (N, K), or a gate and an up projection (2, N, K), laid out for ``linear`` and ``gated_*``.

    ``data`` (..., N', P) with N' = N rounded up to 64 and everything beyond N and K zero: the floating-point weight
    with P = K rounded up to 64 (bits 16), int8 with P = K rounded up to 128 (bits 8) or uint8 with two weights a byte
    (bits 4). ``scale`` and ``zero`` (..., N', ceil(K / group_size)) belong to quantised weights, W = scale * Q + zero,
    in the weight's own dtype (fp32 for fp64 ones). Q is -128 to 127 or 0 to 15.
    """

    data: Tensor
    shape: tuple[int, ...]
    bits: int
    group_size: int | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    version: int = VERSION

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def layout(self) -> list[int]:
        """What the registered ops are told beside the tensors: rows, columns, bits and group size (0: none)."""
        return [self.rows, self.columns, self.bits, self.group_size or 0]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, which is what one pass over the weight reads."""
        return sum(t.nbytes for t in (self.data, self.scale, self.zero) if t is not None)

    def to(self, *args: Any, **kwargs: Any) -> "PackedWeight":
        """On another device, as ``Tensor.to``; for bits 16 the dtype may change too."""
        data = self.data.to(*args, **kwargs)
        if data.dtype != self.data.dtype and self.bits != 16:
            raise ValueError(f"a weight of {self.bits} bits cannot become {data.dtype}: unpack and pack it")
        scale, zero = (None if each is None else each.to(*args, **kwargs) for each in (self.scale, self.zero))
        return replace(self, data=data, scale=scale, zero=zero)


def of_layout(data: Tensor, scale: Tensor | None, zero: Tensor | None, layout: list[int]) -> PackedWeight:
    """The packed weight whose tensors and ``PackedWeight.layout`` these are."""
    rows, columns, bits, group = layout
    return PackedWeight(data, (*data.shape[:-2], rows, columns), bits, group or None, scale, zero)


def pack(weight: Tensor, *, bits: int = 16, group_size: int | None = None) -> PackedWeight:
    """Lay out ``weight`` (N, K), or gate and up as (2, N, K), for the inference ops.

    bits 16 keeps the dtype and every value, fp32 included. bits 8 and 4 quantise each ``group_size`` (default 128, a
    multiple of 32) consecutive weights of a row to 256 or 16 even steps between their least and largest: an error of
    at most half a step, plus the rounding of ``zero`` to its dtype. A group as wide as the row or wider is the row.
    Raises ValueError for other shapes, dtypes, bits and groups, and for weights to quantise that are not finite, or
    whose range within a group is not.
    """
    check_pack(weight, bits, group_size)
    weight = weight.detach()
    if bits == 16:
        return PackedWeight(_padded(weight, round_up(weight.shape[-1], LINE)), tuple(weight.shape), 16)
    group = group_size or GROUP
    return pack_quantised(*quantised_in_groups(weight, bits, group), bits=bits, group_size=group)


def pack_quantised(quantised: Tensor, scale: Tensor, zero: Tensor, *, bits: int, group_size: int) -> PackedWeight:
    """Lay out a weight that is quantised already, W = scale * Q + zero, for the inference ops.

    ``quantised`` (N, K) or (2, N, K): int8 of -128 to 127 (bits 8) or uint8 of 0 to 15 (bits 4); ``scale`` and ``zero``
    (..., N, ceil(K / group_size)) of one floating-point dtype. Raises ValueError for anything else.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, got {bits!r}")
    if not isinstance(group_size, int) or group_size < 1 or group_size % GROUP_MULTIPLE:
        raise ValueError(f"group_size: expected a positive multiple of {GROUP_MULTIPLE}, got {group_size!r}")
    if quantised.dtype != STORED[bits]:
        raise ValueError(f"quantised: expected {STORED[bits]} for {bits} bits, got {quantised.dtype}")
    if quantised.ndim not in (2, 3) or (quantised.ndim == 3 and quantised.shape[0] != 2) or 0 in quantised.shape:
        raise ValueError(f"quantised: expected shape (N, K) or (2, N, K), none of them 0, got {tuple(quantised.shape)}")
    if bits == 4 and int(quantised.max()) > 15:
        raise ValueError(f"quantised: expected values of 0 to 15 for 4 bits, got {int(quantised.max())}")
    columns = quantised.shape[-1]
    groups = (*quantised.shape[:-1], -(-columns // group_size))
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tuple(tensor.shape) != groups or tensor.dtype not in FLOATS or tensor.dtype != scale.dtype:
            raise ValueError(
                f"{name}: expected shape {groups} for groups of {group_size}, scale and zero of one floating-point "
                f"dtype, got {tuple(tensor.shape)} of {tensor.dtype}"
            )
    data = _padded(quantised, round_up(columns, QUANTISED_LINE))
    data = _nibbles(data) if bits == 4 else data
    count = groups[-1]
    packed_scale, packed_zero = _padded(scale, count), _padded(zero, count)
    return PackedWeight(data, tuple(quantised.shape), bits, group_size, packed_scale, packed_zero)


def with_levels(packed: PackedWeight, levels: Tensor) -> PackedWeight:
    """A quantised ``packed`` (N, K) with other ``levels`` (N, K), whole numbers of any dtype within its bits' range."""
    data = _padded(levels.to(STORED[packed.bits]), round_up(packed.columns, QUANTISED_LINE))
    return replace(packed, data=_nibbles(data) if packed.bits == 4 else data)


def unpack(packed: PackedWeight, *, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (N, K) or (2, N, K): a view of the data where it is stored in ``dtype``, computed in fp32 elsewhere.

    ``dtype`` None: the stored one, or that of the scale. Exact for bits 16; for 8 and 4, scale * Q + zero.
    """
    check_packed("packed", packed)
    return unpacked(packed, dtype)[..., : packed.rows, : packed.columns]


def unpacked(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """``unpack`` with its padding of rows and columns, which is zero."""
    if packed.bits == 16:
        return packed.data if dtype is None else packed.data.to(dtype)
    assert packed.scale is not None and packed.zero is not None and packed.group_size is not None
    quantised = from_nibbles(packed.data) if packed.bits == 4 else packed.data
    pitch, columns = quantised.shape[-1], packed.columns
    scale, zero = (
        each.float().repeat_interleave(packed.group_size, -1)[..., :columns] for each in (packed.scale, packed.zero)
    )
    values = torch.nn.functional.pad(scale * quantised[..., :columns].float() + zero, (0, pitch - columns))
    return values.to(dtype or packed.scale.dtype)


def _padded(tensor: Tensor, columns: int) -> Tensor:
    rows = round_up(tensor.shape[-2], LINE)
    result = tensor.new_zeros(*tensor.shape[:-2], rows, columns)
    result[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return result


def _nibbles(quantised: Tensor) -> Tensor:
    """uint8 (..., P) of 0 to 15 -> (..., P / 2), block by block."""
    low, high = quantised.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def from_nibbles(data: Tensor) -> Tensor:
    """The inverse: uint8 (..., P / 2) -> (..., P)."""
    bytes_ = data.unflatten(-1, (-1, BLOCK // 2))
    return torch.stack([bytes_ & 15, bytes_ >> 4], -2).flatten(-3)


def check_pack(weight: Tensor, bits: int, group_size: int | None) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    if weight.ndim not in (2, 3) or (weight.ndim == 3 and weight.shape[0] != 2) or 0 in weight.shape:
        raise ValueError(f"weight: expected shape (N, K) or (2, N, K), none of them 0, got {tuple(weight.shape)}")
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight: expected a floating-point dtype, got {weight.dtype}")
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}, got {bits!r}")
    if group_size is not None:
        if bits == 16:
            raise ValueError(f"group_size: expected None for bits=16, got {group_size!r}")
        if not isinstance(group_size, int) or group_size < 1 or group_size % GROUP_MULTIPLE:
            raise ValueError(f"group_size: expected a positive multiple of {GROUP_MULTIPLE}, got {group_size!r}")
    if bits != 16 and not bool(weight.isfinite().all()):
        raise ValueError(f"weight: expected finite values to quantise to {bits} bits, got NaN or infinity")


def check_packed(name: str, packed: PackedWeight) -> None:
    """That ``packed`` is what ``pack`` returns in this version; reads no tensor."""
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"{name}: expected a PackedWeight, as pack() returns, got {type(packed).__name__}")
    if packed.version != VERSION:
        raise ValueError(f"{name}: expected layout version {VERSION}, got {packed.version}: pack the weight again")
    if packed.bits not in BITS:
        raise ValueError(f"{name}: expected bits among {', '.join(map(str, BITS))}, got {packed.bits!r}")
    stored = {16: FLOATS, 8: (torch.int8,), 4: (torch.uint8,)}[packed.bits]
    if packed.data.dtype not in stored:
        raise ValueError(f"{name}: expected data of {stored[0]} for {packed.bits} bits, got {packed.data.dtype}")
    if len(packed.shape) not in (2, 3):
        raise ValueError(f"{name}: expected shape (N, K) or (2, N, K), got {packed.shape}")
    leading, rows = packed.shape[:-2], round_up(packed.rows, LINE)
    pitch = round_up(packed.columns, LINE if packed.bits == 16 else QUANTISED_LINE) // (2 if packed.bits == 4 else 1)
    expected = {"data": (packed.data, (*leading, rows, pitch))}
    if packed.bits != 16:
        if packed.scale is None or packed.zero is None or not packed.group_size:
            raise ValueError(f"{name}: expected scale, zero and a group size for {packed.bits} bits, got None")
        if packed.group_size % GROUP_MULTIPLE:
            raise ValueError(f"{name}: expected a group size in {GROUP_MULTIPLE}s, got {packed.group_size}")
        if packed.scale.dtype not in FLOATS or packed.zero.dtype != packed.scale.dtype:
            raise ValueError(
                f"{name}: expected scale and zero of one floating-point dtype, "
                f"got {packed.scale.dtype} and {packed.zero.dtype}"
            )
        groups = (*leading, rows, -(-packed.columns // packed.group_size))
        expected |= {"scale": (packed.scale, groups), "zero": (packed.zero, groups)}
    for part, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {part} {shape} for a weight {packed.shape} of {packed.bits} bits, "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        if tensor.device != packed.data.device:
            raise ValueError(f"{name}: expected {part} on {packed.data.device}, got {tensor.device}")
