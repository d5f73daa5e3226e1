"""Every calibration op in plain torch: the definition, the oracle, and the backend of last resort.

T tokens, N out features, K in features, S sequences, U units. Products are formed in row panels
that fit a cache, so no tensor of the size of the weight is ever written. float64 inputs give
float64 results, which is what tests compare with; other inputs are computed and returned in fp32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PANEL_ELEMENTS = 1 << 18  # 1 MiB of fp32, half of a core's L2


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def panel_rows(columns: int, rows: int, multiple: int) -> int:
    """Rows of one panel: a multiple of ``multiple``, about PANEL_ELEMENTS large, at most ``rows``."""
    wanted = max(1, PANEL_ELEMENTS // max(1, columns))
    return min(rows, max(multiple, wanted // multiple * multiple))


_ELEMENT: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "square": torch.square,
    "mixed": lambda s: (s - 0.5 * s.square()).abs(),
}


def weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: Sequence[str], scale: float,
) -> Tensor:  # fmt: skip
    """(len(want), S, U): per sequence, the sum over each unit of f(s), s = scale * w * (dy_n' x_n)."""
    dtype = compute_dtype(x)
    units = (w.shape[0] if axis == "out" else w.shape[1]) // unit_size
    result = torch.zeros(len(want), len(spans), units, dtype=dtype, device=x.device)
    step = panel_rows(w.shape[1], w.shape[0], unit_size if axis == "out" else 1)
    sequences = [(x[a:b].to(dtype), dy[a:b].to(dtype)) for a, b in spans.tolist()]
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        panel = w[rows].to(dtype)  # [R, K]
        for index, (x_n, dy_n) in enumerate(sequences):
            s = panel * (dy_n[:, rows].T @ x_n) * scale  # [R, K]
            for which, name in enumerate(want):
                values = _ELEMENT[name](s)
                if axis == "in":
                    result[which, index] += values.sum(0).view(-1, unit_size).sum(1)
                else:
                    per_row = values.sum(1)  # [R]
                    if bias is not None:
                        per_row = per_row + _ELEMENT[name](bias[rows].to(dtype) * dy_n[:, rows].sum(0) * scale)
                    first = start // unit_size
                    sums = per_row.view(-1, unit_size).sum(1)
                    result[which, index, first : first + len(sums)] = sums
    return result


def coupled_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: Sequence[str], scale: float,
) -> Tensor:  # fmt: skip
    """(len(want), U): the sum over each unit of |mean_n s|, |mean_n s^2| or |mean_n s - mean_n s^2 / 2|."""
    dtype = compute_dtype(x)
    units = (w.shape[0] if axis == "out" else w.shape[1]) // unit_size
    result = torch.zeros(len(want), units, dtype=dtype, device=x.device)
    step = panel_rows(w.shape[1], w.shape[0], unit_size if axis == "out" else 1)
    sequences = [(x[a:b].to(dtype), dy[a:b].to(dtype)) for a, b in spans.tolist()]
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        panel = w[rows].to(dtype)
        mean, square = torch.zeros_like(panel), torch.zeros_like(panel)  # [R, K]
        edge, edge_square = torch.zeros_like(panel[:, 0]), torch.zeros_like(panel[:, 0])  # [R], of the bias
        for x_n, dy_n in sequences:
            s = panel * (dy_n[:, rows].T @ x_n) * scale
            mean += s / len(sequences)
            square += s.square() / len(sequences)
            if bias is not None:
                b = bias[rows].to(dtype) * dy_n[:, rows].sum(0) * scale
                edge += b / len(sequences)
                edge_square += b.square() / len(sequences)
        for which, name in enumerate(want):
            values = _coupled(name, mean, square)
            if axis == "in":
                result[which] += values.sum(0).view(-1, unit_size).sum(1)
            else:
                per_row = values.sum(1) + _coupled(name, edge, edge_square)
                first = start // unit_size
                sums = per_row.view(-1, unit_size).sum(1)
                result[which, first : first + len(sums)] = sums
    return result


def _coupled(name: str, mean: Tensor, square: Tensor) -> Tensor:
    return {"first": mean, "second": square, "mixed": mean - 0.5 * square}[name].abs()


def activation_salience(y: Tensor, dy: Tensor, spans: Tensor, unit_size: int) -> Tensor:
    """(S, U): per sequence, the signed sum over its tokens and each unit's features of y * dy."""
    dtype = compute_dtype(y)
    rows = [torch.einsum("tk,tk->k", y[a:b].to(dtype), dy[a:b].to(dtype)) for a, b in spans.tolist()]
    return torch.stack(rows).unflatten(1, (-1, unit_size)).sum(2)


def activation_statistics(x: Tensor, spans: Tensor, shift: Tensor | None, want: Sequence[str]) -> Tensor:
    """(len(want), S, K): per sequence sums over tokens of x - shift and its square, and max |x|."""
    dtype = compute_dtype(x)
    result = torch.empty(len(want), len(spans), x.shape[1], dtype=dtype, device=x.device)
    for index, (a, b) in enumerate(spans.tolist()):
        rows = x[a:b].to(dtype)
        moved = rows if shift is None else rows - shift.to(dtype)
        for which, name in enumerate(want):
            if name == "absmax":
                result[which, index] = rows.abs().amax(0)
            else:
                result[which, index] = (moved if name == "sum" else moved.square()).sum(0)
    return result
