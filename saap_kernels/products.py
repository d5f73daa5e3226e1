"""Which path runs the inference ops: a backend's kernel, or plain torch where that is faster or all there is."""

from types import ModuleType

from torch import Tensor

from saap_kernels import reference_linear
from saap_kernels.backend import choose
from saap_kernels.packed import PackedWeight, of_layout

IMPLEMENTED = ("triton", "reference")  # in order of preference


def linear(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, layout: list[int]
) -> Tensor:
    """(T, N) by the chosen path; arguments are checked."""
    weight = of_layout(data, scale, zero, layout)
    if not len(x):
        return x.new_empty(0, weight.rows)
    return _chosen("linear", x, weight).linear(x, weight, bias)


def gated_linear(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, layout: list[int],
    activation: str,
) -> Tensor:  # fmt: skip
    """(T, F), a view of rows padded with zeros, by the chosen path; arguments are checked."""
    weight = of_layout(data, scale, zero, layout)
    if not len(x):
        return x.new_empty(0, reference_linear.padded_width(weight.rows))[:, : weight.rows]
    return _chosen("gated_linear", x, weight).gated_linear(x, weight, bias, activation)[:, : weight.rows]


def gated_mlp(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, layout: list[int],
    down_data: Tensor, down_scale: Tensor | None, down_zero: Tensor | None, down_bias: Tensor | None,
    down_layout: list[int], activation: str,
) -> Tensor:  # fmt: skip
    """(T, D) by the chosen path of each product; arguments are checked."""
    gate_up, down = of_layout(data, scale, zero, layout), of_layout(down_data, down_scale, down_zero, down_layout)
    if not len(x):
        return x.new_empty(0, down.rows)
    h = _chosen("gated_linear", x, gate_up).gated_linear(x, gate_up, bias, activation)
    return _chosen("linear", h, down).linear_of_padded(h, down, down_bias)


def _chosen(op: str, x: Tensor, weight: PackedWeight) -> ModuleType:
    """The module that runs ``op``; all have the functions of ``reference_linear``. Triton is imported only to run."""
    name = choose(op, IMPLEMENTED, x)
    if name == "triton":
        from saap_kernels import triton_linear

        return triton_linear
    return {"reference": reference_linear}[name]
