"""CPU backend: torch.mm into a cache-sized panel, then one fused multiply-reduce pass in C++."""

import torch
from torch import Tensor

from saap_kernels import _ext
from saap_kernels.reference import panel_rows

ORDER = ("abs", "square", "mixed")  # what the native kernel accumulates, in this order


def weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float,
) -> Tensor:  # fmt: skip
    """As ``reference.weight_salience`` for fp32 CPU tensors; returns (len(want), S, U)."""
    native = _ext.native()
    assert native is not None  # the backend choice made sure
    rows, columns = w.shape
    units = (rows if axis == "out" else columns) // unit_size
    step = panel_rows(columns, rows, unit_size if axis == "out" else 1)
    sums = torch.zeros(len(spans), len(ORDER), units)  # [S, 3, U]
    buffer = torch.empty(step, columns)
    partial = torch.empty(len(ORDER), step // unit_size if axis == "out" else units)
    threads = torch.get_num_threads()
    sequences = [(x[a:b], dy[a:b].T) for a, b in spans.tolist()]
    for start in range(0, rows, step):
        panel = w[start : start + step]
        gradient = buffer[: len(panel)]
        for index, (x_n, dy_t) in enumerate(sequences):
            torch.addmm(gradient, dy_t[start : start + step], x_n, beta=0, alpha=scale, out=gradient)
            tile = partial[:, : len(panel) // unit_size].contiguous() if axis == "out" else partial
            tile.zero_()
            native.salience_reduce_f32(
                gradient.data_ptr(), gradient.stride(0), panel.data_ptr(), w.stride(0), len(panel), columns,
                unit_size, int(axis == "in"), tile.data_ptr(), threads,
            )  # fmt: skip
            if axis == "out":
                first = start // unit_size
                sums[index, :, first : first + tile.shape[1]] = tile
            else:
                sums[index] += tile
    if bias is not None:
        for index, (_, dy_t) in enumerate(sequences):
            sums[index] += _bias_terms(bias * dy_t.sum(1) * scale, unit_size)
    return sums[:, [ORDER.index(name) for name in want]].transpose(0, 1).contiguous()


def _bias_terms(s: Tensor, unit_size: int) -> Tensor:
    """(3, U): |s|, s^2 and |s - s^2 / 2| of the biases, summed per unit; s (N,)."""
    square = s.square()
    return torch.stack([s.abs(), square, (s - 0.5 * square).abs()]).unflatten(1, (-1, unit_size)).sum(2)
