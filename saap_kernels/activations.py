"""Which backend runs the memory-bound activation ops: all are one pass that sums over tokens."""

from torch import Tensor

from saap_kernels import cpu, cuda, reference
from saap_kernels.backend import choose

IMPLEMENTED = ("triton", "cuda", "cpu", "reference")  # in order of preference
STATISTICS = ("sum", "square", "absmax", "abs")  # in the order of the C++ kernel


def salience(y: Tensor, dy: Tensor, spans: Tensor, unit_size: int) -> Tensor:
    """(S, U) by the chosen backend; arguments are checked."""
    name = choose("activation_salience", IMPLEMENTED, y, dy)
    if name == "reference":
        return reference.activation_salience(y, dy, spans, unit_size)
    if name == "cpu":
        lines, _ = cpu.activation_sums(y, dy, spans, None, statistics=False)
        assert lines is not None  # asked for by passing dy
    else:
        lines = _device_sums(name, y, dy, spans, None, [])[0]
    return _by_unit(lines, unit_size)


def statistics(x: Tensor, spans: Tensor, shift: Tensor | None, want: list[str]) -> Tensor:
    """(len(want), S, K) by the chosen backend; arguments are checked."""
    name = choose("activation_statistics", IMPLEMENTED, x)
    if name == "reference":
        return reference.activation_statistics(x, spans, shift, want)
    if name == "cpu":
        return _cpu_statistics(cpu.activation_sums(x, None, spans, shift, statistics=True)[1], want)
    return _device_sums(name, x, None, spans, shift, want)


def salience_statistics(
    x: Tensor, dx: Tensor, spans: Tensor, unit_size: int, shift: Tensor | None, want: list[str]
) -> tuple[Tensor, Tensor]:
    """Both of the above with one read of x, by the chosen backend; arguments are checked."""
    name = choose("activation_salience_statistics", IMPLEMENTED, x, dx)
    if name == "reference":
        lines = reference.activation_salience(x, dx, spans, unit_size)
        return lines, reference.activation_statistics(x, spans, shift, want)
    if name == "cpu":
        per_feature, sums = cpu.activation_sums(x, dx, spans, shift, statistics=True)
        assert per_feature is not None  # asked for by passing dx
        return _by_unit(per_feature, unit_size), _cpu_statistics(sums, want)
    planes = _device_sums(name, x, dx, spans, shift, want)
    return _by_unit(planes[0].clone(), unit_size), planes[1:]  # an op's results must not share storage


def _device_sums(
    name: str, x: Tensor, dx: Tensor | None, spans: Tensor, shift: Tensor | None, want: list[str]
) -> Tensor:
    if name == "cuda":
        return cuda.sums(x, dx, spans, shift, want)
    from saap_kernels import triton_activations

    return triton_activations.sums(x, dx, spans, shift, want)


def _cpu_statistics(sums: Tensor | None, want: list[str]) -> Tensor:
    assert sums is not None  # asked for
    return sums if tuple(want) == STATISTICS else sums[[STATISTICS.index(name) for name in want]]


def _by_unit(lines: Tensor, unit_size: int) -> Tensor:
    """(S, K) -> (S, U)."""
    return lines if unit_size == 1 else lines.unflatten(1, (-1, unit_size)).sum(2)
