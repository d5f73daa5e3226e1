"""The checked boundary of every public op; below it nothing checks twice."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_matrix(name: str, tensor: Tensor, shape: tuple[int | None, int | None], like: Tensor | None = None) -> None:
    """A floating-point matrix with last stride 1; ``shape`` gives wanted extents (None: any)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    for axis, (wanted, got) in enumerate(zip(shape, tensor.shape, strict=True)):
        if wanted is not None and wanted != got:
            raise ValueError(f"{name}: expected {wanted} in dimension {axis}, got shape {tuple(tensor.shape)}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: expected last stride 1, got strides {tensor.stride()}")
    check_like(name, tensor, like)


def check_vector(name: str, tensor: Tensor, length: int, like: Tensor) -> None:
    if tensor.ndim != 1 or tensor.shape[0] != length:
        raise ValueError(f"{name}: expected shape ({length},), got {tuple(tensor.shape)}")
    check_device(name, tensor, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def check_like(name: str, tensor: Tensor, like: Tensor | None) -> None:
    if like is None:
        return
    check_device(name, tensor, like)
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name}: expected dtype {like.dtype}, got {tensor.dtype}")


def check_spans(spans: Tensor, rows: int) -> None:
    """Half-open row ranges (S, 2), int32 on the CPU, non-empty, increasing, disjoint, inside ``rows``."""
    if not isinstance(spans, Tensor) or spans.dtype != torch.int32 or spans.device.type != "cpu":
        got = f"{spans.dtype} on {spans.device}" if isinstance(spans, Tensor) else type(spans).__name__
        raise ValueError(f"spans: expected an int32 tensor on the CPU, got {got}")
    if spans.ndim != 2 or spans.shape[1] != 2 or spans.shape[0] < 1:
        raise ValueError(f"spans: expected shape (S, 2) with S >= 1, got {tuple(spans.shape)}")
    previous = 0
    for index, (start, stop) in enumerate(spans.tolist()):
        if start >= stop:
            raise ValueError(f"spans: expected non-empty ranges, got [{start}, {stop}) at {index}")
        if start < previous:
            raise ValueError(f"spans: expected increasing, disjoint ranges from 0 on, got [{start}, {stop}) at {index}")
        if stop > rows:
            raise ValueError(f"spans: expected ranges within {rows} rows, got [{start}, {stop}) at {index}")
        previous = stop


def check_unit_size(unit_size: int, extent: int, axis: str) -> None:
    if not isinstance(unit_size, int) or unit_size < 1 or extent % unit_size:
        raise ValueError(f"unit_size: expected a positive divisor of the {extent} {axis} features, got {unit_size!r}")


def check_want(want: Sequence[str], known: tuple[str, ...]) -> list[str]:
    if isinstance(want, str) or not want or len(set(want)) != len(want) or not set(want) <= set(known):
        raise ValueError(f"want: expected distinct names among {', '.join(known)}, got {want!r}")
    return list(want)


def check_weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None
) -> None:
    """What weight_salience and coupled_salience share: x (T, K), dy (T, N), w (N, K), bias (N,)."""
    check_matrix("x", x, (None, None))
    check_matrix("dy", dy, (x.shape[0], None), like=x)
    check_matrix("w", w, (dy.shape[1], x.shape[1]), like=x)
    check_spans(spans, x.shape[0])
    if axis not in ("out", "in"):
        raise ValueError(f'axis: expected "out" or "in", got {axis!r}')
    check_unit_size(unit_size, w.shape[0] if axis == "out" else w.shape[1], axis)
    if bias is not None:
        if axis == "in":
            raise ValueError('bias: expected None for axis="in": a bias belongs to rows')
        check_vector("bias", bias, w.shape[0], x)
