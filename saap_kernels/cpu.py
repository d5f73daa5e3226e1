"""CPU backend: torch.mm into a cache-sized panel, then one fused multiply-reduce pass in C++."""

import torch
from torch import Tensor

from saap_kernels import _ext
from saap_kernels.reference import bias_salience, coupled_bias_salience, coupled_order, panel_rows

ORDER = ("abs", "square", "mixed")  # what the native kernel accumulates, in this order


def weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """As ``reference.weight_salience`` for fp32 CPU tensors; returns (len(want), S, U)."""
    sums = _reduced_panels(x, dy, w, spans, {axis: unit_size}, want, scale)[axis]
    if bias is not None:
        sums += bias_salience(dy, bias, spans, unit_size, want, scale)
    return sums


def weight_salience_both(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, want: list[str], scale: float
) -> tuple[Tensor, Tensor]:
    """Both axes of ``weight_salience`` from one gradient: (len(want), S, N) and (len(want), S, K)."""
    sums = _reduced_panels(x, dy, w, spans, {"out": 1, "in": 1}, want, scale)
    return sums["out"], sums["in"]


def _reduced_panels(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, unit_sizes: dict[str, int], want: list[str], scale: float
) -> dict[str, Tensor]:
    """{axis: (len(want), S, U)}: each panel of a sequence's gradient is formed once and reduced along every axis."""
    native = _ext.native()
    assert native is not None  # the backend choice made sure
    rows, columns = w.shape
    step = panel_rows(columns, rows, unit_sizes.get("out", 1))
    extents = {"out": rows, "in": columns}
    sums = {axis: torch.zeros(len(spans), len(ORDER), extents[axis] // size) for axis, size in unit_sizes.items()}
    buffer = torch.empty(step, columns)
    threads = torch.get_num_threads()
    sequences = [(x[a:b], dy[a:b].T) for a, b in spans.tolist()]
    for start in range(0, rows, step):
        panel = w[start : start + step]
        gradient = buffer[: len(panel)]
        for index, (x_n, dy_t) in enumerate(sequences):
            torch.addmm(gradient, dy_t[start : start + step], x_n, beta=0, alpha=scale, out=gradient)
            for axis, size in unit_sizes.items():
                along = axis == "in"
                tile = torch.zeros(len(ORDER), (columns if along else len(panel)) // size)
                native.salience_reduce_f32(
                    gradient.data_ptr(), gradient.stride(0), panel.data_ptr(), w.stride(0), len(panel), columns,
                    size, int(along), tile.data_ptr(), threads,
                )  # fmt: skip
                first = 0 if along else start // size
                sums[axis][index, :, first : first + tile.shape[1]] += tile
    order = [ORDER.index(name) for name in want]
    return {axis: each[:, order].transpose(0, 1).contiguous() for axis, each in sums.items()}


def coupled_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """As ``reference.coupled_salience`` for fp32 CPU tensors; returns (len(want), U)."""
    native = _ext.native()
    assert native is not None  # the backend choice made sure
    rows, columns = w.shape
    step = panel_rows(columns, rows, unit_size if axis == "out" else 1)
    lines = torch.zeros(len(want), rows if axis == "out" else columns)
    buffers = [torch.empty(step, columns) for _ in range(3)]
    sequences = [(x[a:b], dy[a:b].T) for a, b in spans.tolist()]
    for start in range(0, rows, step):
        panel = w[start : start + step]
        gradient, mean, square = (buffer[: len(panel)] for buffer in buffers)
        mean.zero_()
        square.zero_()
        for x_n, dy_t in sequences:
            torch.addmm(gradient, dy_t[start : start + step], x_n, beta=0, alpha=scale, out=gradient)
            native.coupled_accumulate_f32(
                gradient.data_ptr(), gradient.stride(0), panel.data_ptr(), w.stride(0), len(panel), columns,
                mean.data_ptr(), square.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
        mean /= len(sequences)
        square /= len(sequences)
        for which, name in enumerate(want):
            values = coupled_order(name, mean, square)
            if axis == "out":
                lines[which, start : start + len(panel)] = values.sum(1)
            else:
                lines[which] += values.sum(0)
    result = lines.unflatten(1, (-1, unit_size)).sum(2)
    if bias is not None:
        result += coupled_bias_salience(dy, bias, spans, unit_size, want, scale)
    return result


def activation_sums(
    x: Tensor, dx: Tensor | None, spans: Tensor, shift: Tensor | None, statistics: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(S, K) sums of x * dx if ``dx`` is given; (4, S, K) of ``activations.STATISTICS`` if asked for."""
    native = _ext.native()
    assert native is not None  # the backend choice made sure
    sequences, features = len(spans), x.shape[1]
    salience = None if dx is None else torch.empty(sequences, features)
    sums = torch.empty(4, sequences, features) if statistics else None
    spans = spans.contiguous()
    shift = None if shift is None else shift.float().contiguous()
    native.activation_sums_f32(
        x.data_ptr(), x.stride(0), 0 if dx is None else dx.data_ptr(), 0 if dx is None else dx.stride(0),
        spans.data_ptr(), sequences, features, 0 if shift is None else shift.data_ptr(),
        0 if salience is None else salience.data_ptr(), 0 if sums is None else sums.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return salience, sums
