"""Which backend runs weight_salience and coupled_salience."""

from types import ModuleType

from torch import Tensor

from saap_kernels import cpu, cuda, reference
from saap_kernels.backend import choose

IMPLEMENTED = ("triton", "cuda", "cpu", "reference")  # in order of preference


def weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """(len(want), S, U) by the chosen backend; arguments are checked."""
    chosen = _chosen("weight_salience", x, dy, w)
    return chosen.weight_salience(x, dy, w, spans, axis, unit_size, bias, want, scale)


def coupled_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """(len(want), U) by the chosen backend; arguments are checked."""
    chosen = _chosen("coupled_salience", x, dy, w)
    return chosen.coupled_salience(x, dy, w, spans, axis, unit_size, bias, want, scale)


def weight_salience_both(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, want: list[str], scale: float
) -> tuple[Tensor, Tensor]:
    """(len(want), S, N) and (len(want), S, K) by the chosen backend; arguments are checked."""
    chosen = _chosen("weight_salience_both", x, dy, w)
    if chosen is cpu:
        return cpu.weight_salience_both(x, dy, w, spans, want, scale)
    rows = chosen.weight_salience(x, dy, w, spans, "out", 1, None, want, scale)
    return rows, chosen.weight_salience(x, dy, w, spans, "in", 1, None, want, scale)


def _chosen(op: str, *tensors: Tensor) -> ModuleType:
    """The module of the chosen backend; all have the same functions. Triton is imported only when it is to run."""
    name = choose(op, IMPLEMENTED, *tensors)
    if name == "triton":
        from saap_kernels import triton_weight_salience

        return triton_weight_salience
    return {"cuda": cuda, "cpu": cpu, "reference": reference}[name]
