"""Public inference ops: checked here, registered with torch.library, differentiable, run by the chosen path.

Results have the dtype of x, sums are formed in fp32 (fp64 for fp64). T tokens, K in features, N out features, F the
intermediate width. Weights come from ``pack``; nothing here copies one.
"""

import torch
from torch import Tensor

from saap_kernels import _checks, products
from saap_kernels.gradients import gated_linear_backward, gated_mlp_backward, linear_backward, save_arguments
from saap_kernels.packed import PackedWeight, check_packed
from saap_kernels.reference_linear import padded_width

ACTIVATIONS = ("silu", "gelu_tanh")

_library = torch.library.Library("saap", "FRAGMENT")
_library.define("linear(Tensor x, Tensor data, Tensor? scale, Tensor? zero, Tensor? bias, int[] layout) -> Tensor")
_library.define(
    "gated_linear(Tensor x, Tensor data, Tensor? scale, Tensor? zero, Tensor? bias, int[] layout, str activation)"
    " -> Tensor"
)
_library.define(
    "gated_mlp(Tensor x, Tensor data, Tensor? scale, Tensor? zero, Tensor? bias, int[] layout,"
    " Tensor down_data, Tensor? down_scale, Tensor? down_zero, Tensor? down_bias, int[] down_layout,"
    " str activation) -> Tensor"
)


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x W' + b for a packed weight of any bits: x (..., K) -> (..., N), contiguous; ``bias`` (N,).

    Few tokens run a kernel that is bound by reading the weight, more of them a GEMM. Differentiable in x, bias, a
    floating-point ``packed.data``, and the scale and zero of a quantised one. NaN and infinity go through as in torch.
    Raises ValueError naming the argument for shapes, dtypes or devices that do not fit.
    """
    _check_input("packed", packed, x, 2)
    _check_bias("bias", bias, (packed.rows,), x)
    result = torch.ops.saap.linear(_tokens(x), packed.data, packed.scale, packed.zero, bias, packed.layout)
    return result.view(*x.shape[:-1], packed.rows)


def gated_linear(x: Tensor, packed_gate_up: PackedWeight, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """act(x Wg' + bg) * (x Wu' + bu): x (..., K) -> (..., F), x read once, no intermediate result written.

    ``packed_gate_up`` (2, F, K), ``bias`` (2, F), ``activation`` "silu" or "gelu_tanh". The result is a view of rows
    whose pitch is F rounded up to 64, zero beyond F, so that a following GEMM is aligned whatever F is. For more than
    one leading dimension, or one token, its strides follow from that. Errors and gradients as ``linear``.
    """
    _check_gated("packed_gate_up", packed_gate_up, x, "bias", bias, activation)
    arguments = (packed_gate_up.data, packed_gate_up.scale, packed_gate_up.zero, bias, packed_gate_up.layout)
    result = torch.ops.saap.gated_linear(_tokens(x), *arguments, activation)
    if x.ndim == 2:
        return result  # a view of one token and one feature would lose the pitch
    return result.unflatten(0, x.shape[:-1]) if x.ndim > 2 else result[0]


def gated_mlp(
    x: Tensor,
    packed_gate_up: PackedWeight,
    packed_down: PackedWeight,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """A gated MLP, act(x Wg' + bg) * (x Wu' + bu) Wd' + bd: x (..., K) -> (..., D), contiguous.

    ``packed_gate_up`` (2, F, K), ``packed_down`` (D, F), ``gate_up_bias`` (2, F), ``down_bias`` (D,). Bits may differ.
    Errors and gradients as ``linear``.
    """
    _check_gated("packed_gate_up", packed_gate_up, x, "gate_up_bias", gate_up_bias, activation)
    check_packed("packed_down", packed_down)
    if len(packed_down.shape) != 2 or packed_down.columns != packed_gate_up.rows:
        raise ValueError(f"packed_down: expected shape (D, {packed_gate_up.rows}), got {packed_down.shape}")
    _checks.check_device("packed_down", packed_down.data, x)
    _check_bias("down_bias", down_bias, (packed_down.rows,), x)
    up, down = packed_gate_up, packed_down
    result = torch.ops.saap.gated_mlp(
        _tokens(x), up.data, up.scale, up.zero, gate_up_bias, up.layout,
        down.data, down.scale, down.zero, down_bias, down.layout, activation,
    )  # fmt: skip
    return result.view(*x.shape[:-1], down.rows)


def _tokens(x: Tensor) -> Tensor:
    """x as (T, K) with last stride 1, copied where it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _check_input(name: str, packed: PackedWeight, x: Tensor, ndim: int) -> None:
    check_packed(name, packed)
    if len(packed.shape) != ndim:
        raise ValueError(f"{name}: expected shape {'(N, K)' if ndim == 2 else '(2, F, K)'}, got {packed.shape}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _checks.DTYPES:
        raise ValueError(f"x: expected a floating-point dtype, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != packed.columns:
        raise ValueError(f"x: expected shape (..., {packed.columns}), got {tuple(x.shape)}")
    _checks.check_device(name, packed.data, x)


def _check_gated(
    name: str, packed: PackedWeight, x: Tensor, bias_name: str, bias: Tensor | None, activation: str
) -> None:
    _check_input(name, packed, x, 3)
    _check_bias(bias_name, bias, (2, packed.rows), x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(bias).__name__}")
    if tuple(bias.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(bias.shape)}")
    _checks.check_like(name, bias, x)


def _fake_gated(x: Tensor, layout: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], padded_width(layout[0]))[:, : layout[0]]


_library.impl("linear", products.linear, "CompositeExplicitAutograd")
_library.impl("gated_linear", products.gated_linear, "CompositeExplicitAutograd")
_library.impl("gated_mlp", products.gated_mlp, "CompositeExplicitAutograd")

torch.library.register_fake(
    "saap::linear", lambda x, data, scale, zero, bias, layout: x.new_empty(x.shape[0], layout[0]), lib=_library
)
torch.library.register_fake(
    "saap::gated_linear",
    lambda x, data, scale, zero, bias, layout, activation: _fake_gated(x, layout),
    lib=_library,
)
torch.library.register_fake(
    "saap::gated_mlp",
    lambda x, data, scale, zero, bias, layout, d, s, z, b, down_layout, activation: x.new_empty(
        x.shape[0], down_layout[0]
    ),
    lib=_library,
)
torch.library.register_autograd("saap::linear", linear_backward, setup_context=save_arguments, lib=_library)
torch.library.register_autograd("saap::gated_linear", gated_linear_backward, setup_context=save_arguments, lib=_library)
torch.library.register_autograd("saap::gated_mlp", gated_mlp_backward, setup_context=save_arguments, lib=_library)
