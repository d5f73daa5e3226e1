"""CUDA backend: checks nothing, allocates outputs, hands raw addresses and the stream to the kernels of csrc/."""

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from saap_kernels import _ext, tiled_salience
from saap_kernels._launch import launching
from saap_kernels.schedule import Spans, as_spans, first_blocks, masked_blocks, rows_per_partial
from saap_kernels.tiled_salience import Operands

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PLANES = ("salience", "sum", "square", "absmax")  # in the order of the kernel's slots


def weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """As ``reference.weight_salience`` for fp16, bf16 or fp32 CUDA tensors; (len(want), S, U) fp32."""
    operands = Operands.of(x, dy, w, axis)
    entries, _ = _native().weight_salience_tile(_DTYPES[x.dtype])
    launch = partial(_launch, operands, scale, False)
    tiles = -(-operands.entries // entries)
    return tiled_salience.weight_salience(launch, operands, tiles, dy, spans, unit_size, bias, want, scale)


def coupled_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """As ``reference.coupled_salience`` for fp16, bf16 or fp32 CUDA tensors; (len(want), U) fp32."""
    launch = partial(_launch, Operands.of(x, dy, w, axis), scale, True)
    return tiled_salience.coupled_salience(launch, dy, spans, unit_size, bias, want, scale)


def _launch(operands: Operands, scale: float, coupled: bool, spans: Spans, slots: list[int]) -> Tensor:
    """See ``tiled_salience.Launch``."""
    p, q, w = operands.p, operands.q, operands.w
    entries, tokens = _native().weight_salience_tile(_DTYPES[p.dtype])
    shape = 1 if coupled else len(spans), -(-operands.entries // entries), operands.lines
    with launching("coupled_salience" if coupled else "weight_salience", p.device):
        blocks = masked_blocks(spans, tokens, p.device)
        sums = torch.empty(sum(slot >= 0 for slot in slots), *shape, dtype=torch.float32, device=p.device)
        _native().weight_salience(
            p.data_ptr(), p.stride(0), p.shape[1], q.data_ptr(), q.stride(0), q.shape[1],
            w.data_ptr(), operands.w_stride_u, operands.w_stride_r, operands.lines, operands.entries,
            blocks.data_ptr(), len(blocks) - 1, scale, coupled, slots, torch.Size(shape).numel(), _DTYPES[p.dtype],
            sums.data_ptr(), _stream(p.device),
        )  # fmt: skip
    return sums


def sums(x: Tensor, dx: Tensor | None, spans: Tensor, shift: Tensor | None, want: Sequence[str]) -> Tensor:
    """(len(planes), S, K) fp32, planes: the salience x * dx if ``dx`` is given, then ``want``."""
    features, device, ranges = x.shape[1], x.device, as_spans(spans)
    planes = ([] if dx is None else ["salience"]) + list(want)
    slots = [planes.index(name) if name in planes else -1 for name in PLANES]
    rows = rows_per_partial(ranges[-1][1] - ranges[0][0])
    with launching("activation_planes", device):
        blocks, starts = masked_blocks(ranges, rows, device), first_blocks(ranges, rows, device)
        count = len(blocks) - 1
        partial = torch.empty(len(planes), count, features, dtype=torch.float32, device=device)
        whole = count == len(ranges)  # every sequence is one block: nothing is left to add
        result = partial if whole else partial.new_empty(len(planes), len(ranges), features)
        about = None if shift is None else shift.float().contiguous()
        _native().activation_planes(
            x.data_ptr(), x.stride(0), 0 if dx is None else dx.data_ptr(), 0 if dx is None else dx.stride(0),
            0 if about is None else about.data_ptr(), blocks.data_ptr(), count, starts.data_ptr(), len(ranges),
            features, slots, len(planes), _DTYPES[x.dtype], partial.data_ptr(),
            0 if whole else result.data_ptr(), _stream(device),
        )  # fmt: skip
    return result


def _native() -> ModuleType:
    native = _ext.native()
    assert native is not None  # the backend choice made sure
    return native


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
