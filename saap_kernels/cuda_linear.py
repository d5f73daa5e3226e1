"""CUDA backend of the inference ops: the functions of ``reference_linear`` for 1 to 16 tokens, and those for more.

Checks nothing, allocates outputs, hands raw addresses and the stream to ``linear_decode`` of csrc/. More tokens, and
weights that are stored in another dtype than x, run the library's GEMM.
"""

from functools import cache

import torch
from torch import Tensor

from saap_kernels import library_linear
from saap_kernels._launch import launching
from saap_kernels.cuda import DTYPES, native, stream
from saap_kernels.packed import PackedWeight
from saap_kernels.reference_linear import padded_width
from saap_kernels.splits import split_count

TOKENS, COLUMNS = 16, 1 << 28  # the most that the kernel takes
_ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As ``reference_linear.linear``."""
    if not _takes(x, weight):
        return library_linear.linear(x, weight, bias)
    with launching("linear", x.device):
        result = torch.empty(len(x), weight.rows, dtype=x.dtype, device=x.device)
        _decode(x, weight, bias, None, result)
    return result


def gated_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """As ``reference_linear.gated_linear``."""
    if not _takes(x, weight):
        return library_linear.gated_linear(x, weight, bias, activation)
    with launching("gated_linear", x.device):
        result = torch.empty(len(x), padded_width(weight.rows), dtype=x.dtype, device=x.device)
        _decode(x, weight, bias, activation, result)
    return result


def linear_of_padded(h: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As ``reference_linear.linear_of_padded``."""
    if not _takes(h, weight):
        return library_linear.linear_of_padded(h, weight, bias)
    return linear(h, weight, bias)  # which reads the weight's columns only


def plan(lines: int, columns: int, tokens: int, bits: int, processors: int) -> tuple[int, int]:
    """Slices and splits of a 16-bit product of ``lines`` weight rows, of gate and up together.

    Slices are the warps of a block that share a row's columns. They double until there are two blocks for every
    multiprocessor or each warp has one stage.
    """
    block_lines, stage_bytes, _ = native().linear_decode_tile()
    stages = -(-columns // (stage_bytes * 8 // bits))
    most, slices = min(most_slices(tokens, bits), stages), 1
    while 2 * slices <= most and lines * slices < 2 * processors * block_lines:
        slices *= 2
    # half of the multiprocessors draw most of the memory's bandwidth
    enough = -(-processors // 2)
    return slices, split_count(-(-lines * slices // block_lines), -(-stages // slices), processors, enough)


def most_slices(tokens: int, bits: int) -> int:
    """Whose part of x fits a block's stages, which keeps reading x below half of reading the weight: a power of two."""
    _, stage_bytes, elements = native().linear_decode_tile()
    fitting = elements // (tokens * stage_bytes * 8 // bits)
    return min(8 if tokens <= 8 else 4, 1 << (fitting.bit_length() - 1))


def _takes(x: Tensor, weight: PackedWeight) -> bool:
    """Whether the kernel computes this product: it counts columns and bytes of a row in 32 bits."""
    if x.dtype not in DTYPES or not 1 <= len(x) <= TOKENS or weight.columns > COLUMNS or weight.data.data_ptr() % 16:
        return False
    if weight.scale is None:
        return weight.data.dtype == x.dtype
    scale = weight.scale.dtype
    return scale in (x.dtype, torch.float32) or (x.dtype == torch.float32 and scale in DTYPES)


def _decode(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str | None, result: Tensor) -> None:
    data, scale, zero, halves = weight.data, weight.scale, weight.zero, weight.data.ndim - 1
    rows, columns, tokens = weight.rows, weight.columns, len(x)
    slices, splits = 1, 1
    if x.dtype != torch.float32:
        slices, splits = plan(halves * rows, columns, tokens, weight.bits, processors(x.device))
    partial = torch.empty(splits if splits > 1 else 0, halves, tokens, rows, dtype=torch.float32, device=x.device)
    bias = None if bias is None else bias.contiguous()
    native().linear_decode(
        x.data_ptr(), x.stride(0), tokens,
        data.data_ptr(), data.stride(-2) * data.element_size(), data.stride(0) * data.element_size(),
        rows, columns, weight.bits,
        0 if scale is None else scale.data_ptr(), 0 if zero is None else zero.data_ptr(),
        0 if scale is None else scale.stride(0), weight.group_size or 0, 0 if scale is None else scale.shape[-1],
        0 if scale is None else DTYPES[scale.dtype], 0 if bias is None else bias.data_ptr(), _ACTIVATIONS[activation],
        slices, splits, partial.data_ptr(), result.data_ptr(), result.stride(0),
        DTYPES[x.dtype], stream(x.device),
    )  # fmt: skip


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 for a host that emulates one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
