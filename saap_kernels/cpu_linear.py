"""CPU backend of the inference ops: kernels that read the weight once, or torch.mm with panels of unpacked rows.

Sums are formed in fp32 whatever x is, and rounded once to its dtype.
"""

from typing import Any

import torch
from torch import Tensor

from saap_kernels import _ext, reference_linear
from saap_kernels.packed import LINE, PackedWeight, round_up

# up to so many tokens the kernel is faster than panels: python -m benchmarks.decode --paths measures both
KERNEL_TOKENS = 16
PANEL_ELEMENTS = 1 << 20  # of unpacked rows, which torch.mm then reads from the cache
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of csrc/kernels.h
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
        return weight.data.dtype in _DTYPES
    return weight.scale.dtype in _DTYPES and weight.scale.dtype == weight.zero.dtype


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
    result = x.new_empty(len(x), weight.rows)
    bias = None if bias is None else bias.float()
    if len(x) <= KERNEL_TOKENS:
        _run_kernel(x, weight, bias, 0, result)
        return result
    step = _panel_rows(weight)
    buffer = x.new_empty(step, x.shape[1])
    for start in range(0, weight.rows, step):
        stop = min(weight.rows, start + step)
        _multiply_panel(x, weight, start, stop - start, buffer, bias, start, result[:, start:stop])
    return result


def _gated(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """(T, F') fp32, zero beyond F, of x (T, K') fp32."""
    result = x.new_empty(len(x), reference_linear.padded_width(weight.rows))
    bias = None if bias is None else bias.float().contiguous()
    if len(x) <= KERNEL_TOKENS:
        _run_kernel(x, weight, bias, _ACTIVATIONS[activation], result)
        return result
    step, second = _panel_rows(weight), weight.data.shape[-2]
    buffer = x.new_empty(step, x.shape[1])
    for start in range(0, weight.rows, step):
        count = min(step, weight.rows - start)
        gate, up = x.new_empty(len(x), count), x.new_empty(len(x), count)
        flat = None if bias is None else bias.flatten()
        _multiply_panel(x, weight, start, count, buffer, flat, start, gate)
        _multiply_panel(x, weight, second + start, count, buffer, flat, weight.rows + start, up)
        torch.mul(reference_linear.activate(gate, activation), up, out=result[:, start : start + count])
    result[:, weight.rows :] = 0
    return result


def _panel_rows(weight: PackedWeight) -> int:
    return min(weight.rows, max(LINE, PANEL_ELEMENTS // weight.columns))


def _multiply_panel(
    x: Tensor, weight: PackedWeight, first: int, count: int, buffer: Tensor, bias: Tensor | None, bias_first: int,
    out: Tensor,
) -> None:  # fmt: skip
    """out (T, count) = x times rows ``first`` to ``first + count`` of all that ``weight`` holds, plus their bias."""
    _native().unpack_rows_f32(
        _described(weight), first, count, buffer.data_ptr(), buffer.shape[1], torch.get_num_threads()
    )
    panel = buffer[:count, : weight.columns].T
    if bias is None:
        torch.mm(x[:, : weight.columns], panel, out=out)
    else:
        torch.addmm(bias[bias_first : bias_first + count], x[:, : weight.columns], panel, out=out)


def _run_kernel(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: int, result: Tensor) -> None:
    _native().packed_linear_f32(
        _described(weight), weight.rows, weight.data.shape[-2], x.data_ptr(), x.stride(0), len(x),
        0 if bias is None else bias.data_ptr(), activation, result.data_ptr(), result.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip


def _described(weight: PackedWeight) -> tuple[int, ...]:
    """The ``PackedRows`` of csrc/kernels.h."""
    data, scale, zero = weight.data, weight.scale, weight.zero
    pitch = data.stride(-2) * data.itemsize
    if scale is None or zero is None or weight.group_size is None:
        return data.data_ptr(), pitch, weight.columns, _DTYPES.index(data.dtype), 0, 0, 0, LINE, 0
    storage = _INT8 if weight.bits == 8 else _INT4
    return (
        data.data_ptr(), pitch, weight.columns, storage, scale.data_ptr(), zero.data_ptr(),
        _DTYPES.index(scale.dtype), weight.group_size, scale.shape[-1],
    )  # fmt: skip


def _native() -> Any:
    native = _ext.native()
    assert native is not None  # the backend choice made sure
    return native
