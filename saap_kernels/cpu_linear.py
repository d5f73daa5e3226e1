"""CPU backend of the inference ops: kernels that read the weight once, or torch.mm with panels of unpacked rows.

Sums are formed in fp32 whatever x is, and rounded once to its dtype.
"""

from typing import Any

import torch
from torch import Tensor

from saap_kernels import _ext, reference_linear
from saap_kernels.packed import LINE, PackedWeight, round_up

KERNEL_TOKENS = 128  # up to so many the kernel is the faster: python -m benchmarks.decode --switch
PANEL_ELEMENTS = 1 << 22  # of unpacked rows, which torch.mm then reads from the last cache
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of csrc/kernels.h
_INT8, _INT4 = 3, 4
_ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As ``reference_linear.linear`` for CPU tensors of 16 or 32 bits."""
    if not _readable(weight):
        return reference_linear.linear(x, weight, bias)
    return _linear(_padded(x, weight), weight, bias).to(x.dtype)


def gated_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """As ``reference_linear.gated_linear`` for CPU tensors of 16 or 32 bits."""
    if not _readable(weight):
        return reference_linear.gated_linear(x, weight, bias, activation)
    return _gated(_padded(x, weight), weight, bias, activation).to(x.dtype)


def linear_of_padded(h: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``linear`` of h (T, K') as ``gated_linear`` leaves it: K rounded up to 64, zero beyond K."""
    if not _readable(weight):
        return reference_linear.linear_of_padded(h, weight, bias)
    return _linear(h.float(), weight, bias).to(h.dtype)


def _readable(weight: PackedWeight) -> bool:
    """Whether the kernels know what ``weight`` is made of; all but fp64."""
    if weight.scale is None or weight.zero is None:
        return weight.data.dtype in SCALE_DTYPES
    return weight.scale.dtype in SCALE_DTYPES and weight.scale.dtype == weight.zero.dtype


def _padded(x: Tensor, weight: PackedWeight) -> Tensor:
    """x in fp32 with K rounded up to 64, zero beyond K: what lies there in memory is not ours to read."""
    width = round_up(weight.columns, LINE)
    if x.dtype == torch.float32 and width == weight.columns:
        return x
    padded = torch.zeros(len(x), width)
    padded[:, : weight.columns] = x
    return padded


def _linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """(T, N) fp32 of x (T, K') fp32."""
    bias = None if bias is None else bias.float().contiguous()
    return (kernel_linear if len(x) <= KERNEL_TOKENS else panel_linear)(x, weight, bias)


def _gated(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """(T, F') fp32, zero beyond F, of x (T, K') fp32."""
    bias = None if bias is None else bias.float().contiguous()
    return (kernel_gated if len(x) <= KERNEL_TOKENS else panel_gated)(x, weight, bias, activation)


def kernel_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """(T, N) of x (T, K') and a contiguous bias, all fp32, with the weight read as it is stored."""
    result = x.new_empty(len(x), weight.rows)
    _run_kernel(x, weight, bias, 0, result)
    return result


def kernel_gated(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """(T, F'), like ``kernel_linear``."""
    result = x.new_empty(len(x), reference_linear.padded_width(weight.rows))
    _run_kernel(x, weight, bias, _ACTIVATIONS[activation], result)
    return result


def panel_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``kernel_linear`` by torch.mm, with panels of rows as fp32; an fp32 weight is one."""
    if weight.data.dtype == torch.float32:
        return reference_linear.linear(x[:, : weight.columns], weight, bias)
    result, step = x.new_empty(len(x), weight.rows), _panel_rows(weight)
    buffer = x.new_empty(step, x.shape[1])
    for start in range(0, weight.rows, step):
        rows = slice(start, min(weight.rows, start + step))
        _multiply_panel(x, weight, rows, 0, buffer, None if bias is None else bias[rows], result[:, rows])
    return result


def panel_gated(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """``kernel_gated``, like ``panel_linear``."""
    if weight.data.dtype == torch.float32:
        return reference_linear.gated_linear(x[:, : weight.columns], weight, bias, activation)
    result, step = x.new_empty(len(x), reference_linear.padded_width(weight.rows)), _panel_rows(weight)
    buffer = x.new_empty(step, x.shape[1])
    for start in range(0, weight.rows, step):
        rows = slice(start, min(weight.rows, start + step))
        gate, up = x.new_empty(2, len(x), rows.stop - start)
        for half, out in enumerate((gate, up)):
            _multiply_panel(x, weight, rows, half, buffer, None if bias is None else bias[half, rows], out)
        torch.mul(reference_linear.activate(gate, activation), up, out=result[:, rows])
    result[:, weight.rows :] = 0
    return result


def _panel_rows(weight: PackedWeight) -> int:
    return min(weight.rows, max(LINE, PANEL_ELEMENTS // weight.columns))


def _multiply_panel(
    x: Tensor, weight: PackedWeight, rows: slice, half: int, buffer: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """out = x times ``rows`` of a weight, or of one half of gate and up, plus their bias."""
    first, count = half * weight.data.shape[-2] + rows.start, rows.stop - rows.start
    _native().unpack_rows_f32(
        described(weight), first, count, buffer.data_ptr(), buffer.stride(0), torch.get_num_threads()
    )
    x, panel = x[:, : weight.columns], buffer[:count, : weight.columns].T
    if bias is None:
        torch.mm(x, panel, out=out)
    else:
        torch.addmm(bias, x, panel, out=out)


def _run_kernel(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: int, result: Tensor) -> None:
    _native().packed_linear_f32(
        described(weight), weight.rows, weight.data.shape[-2], x.data_ptr(), x.stride(0), len(x),
        0 if bias is None else bias.data_ptr(), activation, result.data_ptr(), result.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip


def described(weight: PackedWeight) -> tuple[int, ...]:
    """The ``PackedRows`` of csrc/kernels.h."""
    data, scale, zero = weight.data, weight.scale, weight.zero
    pitch = data.stride(-2) * data.itemsize
    if scale is None or zero is None or weight.group_size is None:
        return data.data_ptr(), pitch, weight.columns, SCALE_DTYPES.index(data.dtype), 0, 0, 0, LINE, 0
    storage = _INT8 if weight.bits == 8 else _INT4
    return (
        data.data_ptr(), pitch, weight.columns, storage, scale.data_ptr(), zero.data_ptr(),
        SCALE_DTYPES.index(scale.dtype), weight.group_size, scale.shape[-1],
    )  # fmt: skip


def _native() -> Any:
    native = _ext.native()
    assert native is not None  # the backend choice made sure
    return native
