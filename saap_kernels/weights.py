"""Which backend runs weight_salience and coupled_salience."""

from torch import Tensor

from saap_kernels import cpu, cuda, reference
from saap_kernels.backend import choose

IMPLEMENTED = ("triton", "cuda", "cpu", "reference")  # in order of preference


def weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """(len(want), S, U) by the chosen backend; arguments are checked."""
    name = choose("weight_salience", IMPLEMENTED, x, dy, w)
    if name == "triton":
        from saap_kernels import triton_weight_salience

        return triton_weight_salience.weight_salience(x, dy, w, spans, axis, unit_size, bias, want, scale)
    module = {"cuda": cuda, "cpu": cpu, "reference": reference}[name]
    return module.weight_salience(x, dy, w, spans, axis, unit_size, bias, want, scale)


def coupled_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """(len(want), U) by the chosen backend; arguments are checked."""
    name = choose("coupled_salience", IMPLEMENTED, x, dy, w)
    if name == "triton":
        from saap_kernels import triton_weight_salience

        return triton_weight_salience.coupled_salience(x, dy, w, spans, axis, unit_size, bias, want, scale)
    module = {"cuda": cuda, "cpu": cpu, "reference": reference}[name]
    return module.coupled_salience(x, dy, w, spans, axis, unit_size, bias, want, scale)


def weight_salience_both(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, want: list[str], scale: float
) -> tuple[Tensor, Tensor]:
    """(len(want), S, N) and (len(want), S, K) by the chosen backend; arguments are checked."""
    if choose("weight_salience_both", IMPLEMENTED, x, dy, w) == "cpu":
        return cpu.weight_salience_both(x, dy, w, spans, want, scale)
    rows = weight_salience(x, dy, w, spans, "out", 1, None, want, scale)
    return rows, weight_salience(x, dy, w, spans, "in", 1, None, want, scale)
