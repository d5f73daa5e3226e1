"""Public calibration ops: checked here, registered with torch.library, run by the chosen backend.

Shapes: T tokens, N out features, K in features, S sequences, U units. Results are fp32 (float64
for float64 inputs), freshly allocated and deterministic. ``spans`` (S, 2) int32 on the CPU holds one
half-open row range per sequence, increasing and disjoint; rows outside are never read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saap_kernels import _checks, activations, reference, weights

SALIENCE = ("abs", "square", "mixed")
COUPLED = ("first", "second", "mixed")
STATISTICS = ("sum", "square", "absmax", "abs")
DEFAULT_STATISTICS = ("sum", "square", "absmax")

_library = torch.library.Library("saap", "DEF")
_salience_arguments = (
    "Tensor x, Tensor dy, Tensor w, Tensor spans, str axis, int unit_size, Tensor? bias, str[] want, float scale"
)
_library.define(f"weight_salience({_salience_arguments}) -> Tensor")
_library.define(f"coupled_salience({_salience_arguments}) -> Tensor")
_library.define(
    "weight_salience_both(Tensor x, Tensor dy, Tensor w, Tensor spans, str[] want, float scale) -> (Tensor, Tensor)"
)
_library.define("activation_salience(Tensor y, Tensor dy, Tensor spans, int unit_size) -> Tensor")
_library.define("activation_statistics(Tensor x, Tensor spans, Tensor? shift, str[] want) -> Tensor")
_library.define(
    "activation_salience_statistics(Tensor x, Tensor dx, Tensor spans, int unit_size, Tensor? shift, str[] want)"
    " -> (Tensor, Tensor)"
)


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


def weight_salience_both(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, *, want: Sequence[str] = SALIENCE, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``weight_salience`` of every row and of every column: (len(want), S, N) and (len(want), S, K).

    For pruners that also remove hidden dimensions. On the CPU the gradient is formed once for both; on GPUs twice.
    """
    wanted = _checks.check_want(want, SALIENCE)
    _checks.check_weight_salience(x, dy, w, spans, "out", 1, None)
    return torch.ops.saap.weight_salience_both(x, dy, w, spans, wanted, scale)


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
    _check_pair("y", y, "dy", dy, spans, unit_size)
    return torch.ops.saap.activation_salience(y, dy, spans, unit_size)


def activation_statistics(
    x: Tensor, spans: Tensor, *, shift: Tensor | None = None, want: Sequence[str] = DEFAULT_STATISTICS
) -> Tensor:
    """Sums over each sequence's tokens: x (T, K) -> (len(want), S, K).

    "sum" and "square" are of x - shift, shift (K,) or 0: a shift near the mean keeps variances exact.
    "absmax" is the largest |x| and "abs" the sum of |x|, both without the shift.
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
    want: Sequence[str] = DEFAULT_STATISTICS,
) -> tuple[Tensor, Tensor]:
    """``activation_salience(x, dx)`` and ``activation_statistics(x)`` of the same rows, each read once."""
    wanted = _checks.check_want(want, STATISTICS)
    _check_pair("x", x, "dx", dx, spans, unit_size)
    if shift is not None:
        _checks.check_vector("shift", shift, x.shape[1], x)
    return torch.ops.saap.activation_salience_statistics(x, dx, spans, unit_size, shift, wanted)


def _check_pair(name: str, x: Tensor, other_name: str, other: Tensor, spans: Tensor, unit_size: int) -> None:
    _checks.check_matrix(name, x, (None, None))
    _checks.check_matrix(other_name, other, (x.shape[0], x.shape[1]), like=x)
    _checks.check_spans(spans, x.shape[0])
    _checks.check_unit_size(unit_size, x.shape[1], "in")


def _result(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=reference.compute_dtype(like))


def _units(w: Tensor, axis: str, unit_size: int) -> int:
    return (w.shape[0] if axis == "out" else w.shape[1]) // unit_size


_library.impl("weight_salience", weights.weight_salience, "CompositeExplicitAutograd")
_library.impl("weight_salience_both", weights.weight_salience_both, "CompositeExplicitAutograd")
_library.impl("coupled_salience", weights.coupled_salience, "CompositeExplicitAutograd")
_library.impl("activation_salience", activations.salience, "CompositeExplicitAutograd")
_library.impl("activation_statistics", activations.statistics, "CompositeExplicitAutograd")
_library.impl("activation_salience_statistics", activations.salience_statistics, "CompositeExplicitAutograd")

torch.library.register_fake(
    "saap::weight_salience",
    lambda x, dy, w, spans, axis, unit_size, bias, want, scale: _result(
        x, len(want), spans.shape[0], _units(w, axis, unit_size)
    ),
)
torch.library.register_fake(
    "saap::weight_salience_both",
    lambda x, dy, w, spans, want, scale: tuple(_result(x, len(want), spans.shape[0], extent) for extent in w.shape),
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
torch.library.register_fake(
    "saap::activation_salience_statistics",
    lambda x, dx, spans, unit_size, shift, want: (
        _result(x, spans.shape[0], x.shape[1] // unit_size),
        _result(x, len(want), spans.shape[0], x.shape[1]),
    ),
)
