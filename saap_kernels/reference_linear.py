"""The inference ops in plain torch: their definition, the path of the library's GEMM, and the oracle's counterpart.

Every backend of these ops is a module with these functions. T tokens, N out features, K in features, F the
intermediate width; ``x`` (T, K) has last stride 1, arguments are checked.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from saap_kernels.packed import LINE, PackedWeight, round_up, unpacked


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """(T, N): x W' + b in the dtype of x."""
    return functional.linear(x, unpacked(weight, x.dtype)[: weight.rows, : weight.columns], bias)


def gated_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """act(x Wg' + bg) * (x Wu' + bu), (T, F'): F rounded up to 64, zero beyond F; ``bias`` (2, F)."""
    gate, up = (
        functional.linear(x, each[: weight.rows, : weight.columns], None if bias is None else bias[index])
        for index, each in enumerate(unpacked(weight, x.dtype))
    )
    h = x.new_empty(len(x), padded_width(weight.rows))
    torch.mul(activate(gate, activation), up, out=h[:, : weight.rows])
    h[:, weight.rows :] = 0
    return h


def linear_of_padded(h: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``linear`` of h (T, K') as ``gated_linear`` leaves it: K rounded up to 64, zero beyond K."""
    return linear(h[:, : weight.columns], weight, bias)


def activate(gate: Tensor, activation: str) -> Tensor:
    """SiLU, or GELU by its tanh approximation."""
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh")


def padded_width(features: int) -> int:
    """Of the rows that ``gated_linear`` returns."""
    return round_up(features, LINE)


def linear_gradients(dy: Tensor, x: Tensor, weight: PackedWeight, wanted: dict[str, bool]) -> dict[str, Tensor | None]:
    """{"x", "data", "scale", "zero", "bias"}: gradients of ``linear``, None where not ``wanted``; dy (T, N).

    That of Q is of no use and always None; those of scale and zero are sums over each group of dW * Q and of dW.
    """
    found: dict[str, Tensor | None] = dict.fromkeys(("x", "data", "scale", "zero", "bias"))
    if wanted.get("x"):
        found["x"] = dy @ unpacked(weight, x.dtype)[: weight.rows, : weight.columns]
    if wanted.get("bias"):
        found["bias"] = dy.sum(0)
    if any(wanted.get(name) for name in ("data", "scale", "zero")):
        found |= weight_gradients(dy.T @ x, weight)
    return {name: value if wanted.get(name) else None for name, value in found.items()}


def weight_gradients(dw: Tensor, weight: PackedWeight) -> dict[str, Tensor | None]:
    """{"data", "scale", "zero"} gradients from dw (N, K) of the weight's values."""
    rows, columns = weight.rows, weight.columns
    if weight.bits == 16:
        pitch = weight.data.shape[-1]
        return {"data": functional.pad(dw.to(weight.data.dtype), (0, pitch - columns, 0, weight.data.shape[-2] - rows))}
    scale, group = weight.scale, weight.group_size
    assert scale is not None and group is not None
    ones, groups = torch.ones_like(scale, dtype=dw.dtype), scale.shape[-1]
    steps = unpacked(replace(weight, scale=ones, zero=ones - 1), dw.dtype)

    def by_group(values: Tensor) -> Tensor:
        padded = functional.pad(values, (0, groups * group - columns, 0, scale.shape[-2] - rows))
        return padded.unflatten(-1, (groups, group)).sum(-1).to(scale.dtype)

    return {"data": None, "scale": by_group(dw * steps[:rows, :columns]), "zero": by_group(dw)}
