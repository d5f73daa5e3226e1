"""Gradients of the inference ops, in plain torch: nothing of the forward pass is kept but its arguments."""

from typing import Any

import torch
from torch import Tensor

from saap_kernels.packed import PackedWeight, of_layout
from saap_kernels.reference_linear import activate, linear_gradients


def save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the tensors and, apart from them, what else an op was called with."""
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.places = [index for index, each in enumerate(inputs) if isinstance(each, Tensor)]
    ctx.others = [None if isinstance(each, Tensor) else each for each in inputs]


def _arguments(ctx: Any) -> list[Any]:
    found = list(ctx.others)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        found[place] = tensor
    return found


def linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of ``linear(x, data, scale, zero, bias, layout)``."""
    x, data, scale, zero, _, layout = _arguments(ctx)
    needs = dict(zip(("x", "data", "scale", "zero", "bias"), ctx.needs_input_grad, strict=False))
    found = linear_gradients(dy, x, of_layout(data, scale, zero, layout), needs)
    return (*found.values(), None)


def gated_linear_backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    """Of ``gated_linear(x, data, scale, zero, bias, layout, activation)``; both projections are formed again."""
    x, data, scale, zero, bias, layout, activation = _arguments(ctx)
    needs = dict(zip(("x", "data", "scale", "zero", "bias"), ctx.needs_input_grad, strict=False))
    found = _gated_gradients(dh, x, of_layout(data, scale, zero, layout), bias, activation, needs)
    return (*found.values(), None, None)


def gated_mlp_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of ``gated_mlp``: h is formed again; gate and up once more for its own gradient."""
    x, data, scale, zero, bias, layout, down_data, down_scale, down_zero, _, down_layout, activation = _arguments(ctx)
    names = ("x", "data", "scale", "zero", "bias")
    needs = dict(zip(names, ctx.needs_input_grad[:5], strict=True))
    down_needs = dict(zip(names[1:], ctx.needs_input_grad[6:10], strict=True))
    down, upper = of_layout(down_data, down_scale, down_zero, down_layout), any(needs.values())
    h = torch.ops.saap.gated_linear(x, data, scale, zero, bias, layout, activation)
    below = linear_gradients(dy, h, down, {"x": upper, **down_needs})
    dh = below.pop("x")
    weight = of_layout(data, scale, zero, layout)
    above = dict.fromkeys(names) if dh is None else _gated_gradients(dh, x, weight, bias, activation, needs)
    return (*above.values(), None, *below.values(), None, None)


def _gated_gradients(
    dh: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str, needs: dict[str, bool]
) -> dict[str, Tensor | None]:
    """{"x", "data", "scale", "zero", "bias"} of ``gated_linear``; dh (T, F)."""
    halves = [_half(weight, index) for index in range(2)]
    gate, up = (
        torch.ops.saap.linear(x, w.data, w.scale, w.zero, None if bias is None else bias[index], w.layout)
        for index, w in enumerate(halves)
    )
    d_gate, d_up = _activation_backward(dh * up, gate, activation), dh * activate(gate, activation)
    found = [linear_gradients(dy, x, w, needs) for dy, w in zip((d_gate, d_up), halves, strict=True)]
    return {
        name: None if found[0][name] is None else _joined(name, found[0][name], found[1][name]) for name in found[0]
    }


def _activation_backward(grad: Tensor, gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")


def _joined(name: str, first: Tensor | None, second: Tensor | None) -> Tensor:
    assert first is not None and second is not None
    return first + second if name == "x" else torch.stack([first, second])


def _half(weight: PackedWeight, index: int) -> PackedWeight:
    scale, zero = (None if each is None else each[index] for each in (weight.scale, weight.zero))
    return PackedWeight(weight.data[index], weight.shape[1:], weight.bits, weight.group_size, scale, zero)
