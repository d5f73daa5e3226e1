"""CUDA backend: checks nothing, allocates outputs, hands raw addresses and the stream to the kernels of csrc/."""

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from saap_kernels import _ext, tiled_salience
from saap_kernels._launch import launching
from saap_kernels.planes import Planes
from saap_kernels.schedule import Spans, masked_blocks
from saap_kernels.tiled_salience import Operands

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """As ``reference.weight_salience`` for fp16, bf16 or fp32 CUDA tensors; (len(want), S, U) fp32."""
    operands = Operands.of(x, dy, w, axis)
    entries, _ = native().weight_salience_tile(DTYPES[x.dtype])
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
    entries, tokens = native().weight_salience_tile(DTYPES[p.dtype])
    shape = 1 if coupled else len(spans), -(-operands.entries // entries), operands.lines
    with launching("coupled_salience" if coupled else "weight_salience", p.device):
        blocks = masked_blocks(spans, tokens, p.device)
        sums = torch.empty(sum(slot >= 0 for slot in slots), *shape, dtype=torch.float32, device=p.device)
        native().weight_salience(
            p.data_ptr(), p.stride(0), p.shape[1], q.data_ptr(), q.stride(0), q.shape[1],
            w.data_ptr(), operands.w_stride_u, operands.w_stride_r, operands.lines, operands.entries,
            blocks.data_ptr(), len(blocks) - 1, scale, coupled, slots, torch.Size(shape).numel(), DTYPES[p.dtype],
            sums.data_ptr(), stream(p.device),
        )  # fmt: skip
    return sums


def sums(x: Tensor, dx: Tensor | None, spans: Tensor, shift: Tensor | None, want: Sequence[str]) -> Tensor:
    """(len(planes), S, K) fp32, planes: the salience x * dx if ``dx`` is given, then ``want``."""
    with launching("activation_planes", x.device):
        planes = Planes.of(x, dx, spans, want)
        about = None if shift is None else shift.float().contiguous()
        native().activation_planes(
            x.data_ptr(), x.stride(0), 0 if dx is None else dx.data_ptr(), 0 if dx is None else dx.stride(0),
            0 if about is None else about.data_ptr(), planes.blocks.data_ptr(), planes.count,
            planes.starts.data_ptr(), len(spans), x.shape[1], planes.slots, len(planes.partial), DTYPES[x.dtype],
            planes.partial.data_ptr(), 0 if planes.result is planes.partial else planes.result.data_ptr(),
            stream(x.device),
        )  # fmt: skip
    return planes.result


def native() -> ModuleType:
    """The compiled module."""
    module = _ext.native()
    assert module is not None  # the backend choice made sure
    return module


def stream(device: torch.device) -> int:
    """Of the device, the current one, by address."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
