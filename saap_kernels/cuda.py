"""CUDA backend: checks nothing, allocates outputs, hands raw addresses and the stream to the kernels."""

import torch
from torch import Tensor

from saap_kernels import _ext

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROWS_PER_PARTIAL = 64  # tokens that one block sums before the ordered second stage


def activation_salience(y: Tensor, dy: Tensor, spans: Tensor, unit_size: int) -> Tensor:
    """As ``reference.activation_salience`` for fp16, bf16 or fp32 CUDA tensors; returns (S, U) fp32."""
    native = _ext.native()
    assert native is not None  # the backend choice made sure
    sequences, features = len(spans), y.shape[1]
    longest = int((spans[:, 1] - spans[:, 0]).max())
    chunks = -(-longest // ROWS_PER_PARTIAL)
    with torch.cuda.device(y.device):
        partial = torch.empty(sequences, chunks, features, device=y.device, dtype=torch.float32)
        result = torch.empty(sequences, features // unit_size, device=y.device, dtype=torch.float32)
        device_spans = spans.to(y.device)
        native.activation_salience(
            y.data_ptr(), y.stride(0), dy.data_ptr(), dy.stride(0), device_spans.data_ptr(), sequences, chunks,
            ROWS_PER_PARTIAL, features, unit_size, _DTYPES[y.dtype], partial.data_ptr(), result.data_ptr(),
            torch.cuda.current_stream(y.device).cuda_stream,
        )  # fmt: skip
    return result
