"""Public calibration ops: checked here, registered with torch.library, run by the chosen backend.

Shapes: T tokens, N out features, K in features, S sequences, U units. Results are fp32 (float64
for float64 inputs), freshly allocated and deterministic. ``spans`` (S, 2) int32 on the CPU holds one
half-open row range per sequence, increasing and disjoint; rows outside are never read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saap_kernels import _checks, cpu, cuda, reference
from saap_kernels.backend import use_native_cpu, use_native_cuda

SALIENCE = ("abs", "square", "mixed")
COUPLED = ("first", "second", "mixed")
STATISTICS = ("sum", "square", "absmax")

_library = torch.library.Library("saap", "DEF")
_salience_arguments = (
    "Tensor x, Tensor dy, Tensor w, Tensor spans, str axis, int unit_size, Tensor? bias, str[] want, float scale"
)
_library.define(f"weight_salience({_salience_arguments}) -> Tensor")
_library.define(f"coupled_salience({_salience_arguments}) -> Tensor")
_library.define("activation_salience(Tensor y, Tensor dy, Tensor spans, int unit_size) -> Tensor")
_library.define("activation_statistics(Tensor x, Tensor spans, Tensor? shift, str[] want) -> Tensor")


def weight_salience(
    x: Tensor,
    dy: Tensor,
    w: Tensor,
    spans: Tensor,
    *,
    axis: str,
    unit_size: int = 1,
    bias: Tensor | None = None,
    want: Sequence[str] = SALIENCE,
    scale: float = 1.0,
) -> Tensor:
    """Element-wise Taylor salience of a Linear's weight, per sequence and unit, without forming dW.

    x (T, K) layer input, dy (T, N) gradient of its output, w (N, K). With s_n = scale * w * (dy_n' x_n),
    returns (len(want), S, U) sums over each unit of |s|, s^2 or |s - s^2 / 2|. ``axis`` "out": units are
    ``unit_size`` consecutive rows of w, and ``bias`` (N,) adds scale * b * sum_t dy to them; "in": columns.
    ``scale`` undoes a loss scale. Additive over sequences. Source: method section 2a (IE).
    """
    wanted = _checks.check_want(want, SALIENCE)
    _checks.check_weight_salience(x, dy, w, spans, axis, unit_size, bias)
    return torch.ops.saap.weight_salience(x, dy, w, spans, axis, unit_size, bias, wanted, scale)


def coupled_salience(
    x: Tensor,
    dy: Tensor,
    w: Tensor,
    spans: Tensor,
    *,
    axis: str,
    unit_size: int = 1,
    bias: Tensor | None = None,
    want: Sequence[str] = COUPLED,
    scale: float = 1.0,
) -> Tensor:
    """LLM-Pruner's coupled salience: absolute value after the mean over this call's sequences.

    Arguments as ``weight_salience``. Returns (len(want), U) sums over each unit of |mean_n s|,
    |mean_n s^2| or |mean_n s - mean_n s^2 / 2|. Not additive: exact for the sequences of one call only.
    """
    wanted = _checks.check_want(want, COUPLED)
    _checks.check_weight_salience(x, dy, w, spans, axis, unit_size, bias)
    return torch.ops.saap.coupled_salience(x, dy, w, spans, axis, unit_size, bias, wanted, scale)


def activation_salience(y: Tensor, dy: Tensor, spans: Tensor, *, unit_size: int = 1) -> Tensor:
    """Signed vector-wise salience from activations: y, dy (T, K) -> (S, U) sums of y * dy.

    With a Linear's output and its gradient this equals sum(w * dw) + b * db of each row (out units);
    with its input and the layer's own input gradient, sum(w * dw) of each column (method section 2a).
    """
    _checks.check_matrix("y", y, (None, None))
    _checks.check_matrix("dy", dy, (y.shape[0], y.shape[1]), like=y)
    _checks.check_spans(spans, y.shape[0])
    _checks.check_unit_size(unit_size, y.shape[1], "in")
    return torch.ops.saap.activation_salience(y, dy, spans, unit_size)


def activation_statistics(
    x: Tensor, spans: Tensor, *, shift: Tensor | None = None, want: Sequence[str] = STATISTICS
) -> Tensor:
    """Sums over each sequence's tokens: x (T, K) -> (len(want), S, K).

    "sum" and "square" are of x - shift, shift (K,) or 0: a shift near the mean keeps variances exact.
    "absmax" is the largest |x|, without the shift.
    """
    wanted = _checks.check_want(want, STATISTICS)
    _checks.check_matrix("x", x, (None, None))
    _checks.check_spans(spans, x.shape[0])
    if shift is not None:
        _checks.check_vector("shift", shift, x.shape[1], x)
    return torch.ops.saap.activation_statistics(x, spans, shift, wanted)


def activation_salience_statistics(
    x: Tensor,
    dx: Tensor,
    spans: Tensor,
    *,
    unit_size: int = 1,
    shift: Tensor | None = None,
    want: Sequence[str] = STATISTICS,
) -> tuple[Tensor, Tensor]:
    """``activation_salience(x, dx)`` and ``activation_statistics(x)`` of the same rows."""
    return (
        activation_salience(x, dx, spans, unit_size=unit_size),
        activation_statistics(x, spans, shift=shift, want=want),
    )


def _run_weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    run = cpu.weight_salience if use_native_cpu("weight_salience", x, dy, w) else reference.weight_salience
    return run(x, dy, w, spans, axis, unit_size, bias, want, scale)


def _run_activation_salience(y: Tensor, dy: Tensor, spans: Tensor, unit_size: int) -> Tensor:
    run = cuda.activation_salience if use_native_cuda("activation_salience", y, dy) else reference.activation_salience
    return run(y, dy, spans, unit_size)


def _result(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=reference.compute_dtype(like))


def _units(w: Tensor, axis: str, unit_size: int) -> int:
    return (w.shape[0] if axis == "out" else w.shape[1]) // unit_size


_library.impl("weight_salience", _run_weight_salience, "CompositeExplicitAutograd")
_library.impl("coupled_salience", reference.coupled_salience, "CompositeExplicitAutograd")
_library.impl("activation_salience", _run_activation_salience, "CompositeExplicitAutograd")
_library.impl("activation_statistics", reference.activation_statistics, "CompositeExplicitAutograd")

torch.library.register_fake(
    "saap::weight_salience",
    lambda x, dy, w, spans, axis, unit_size, bias, want, scale: _result(
        x, len(want), spans.shape[0], _units(w, axis, unit_size)
    ),
)
torch.library.register_fake(
    "saap::coupled_salience",
    lambda x, dy, w, spans, axis, unit_size, bias, want, scale: _result(x, len(want), _units(w, axis, unit_size)),
)
torch.library.register_fake(
    "saap::activation_salience",
    lambda y, dy, spans, unit_size: _result(y, spans.shape[0], y.shape[1] // unit_size),
)
torch.library.register_fake(
    "saap::activation_statistics",
    lambda x, spans, shift, want: _result(x, len(want), spans.shape[0], x.shape[1]),
)
