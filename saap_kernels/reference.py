"""Every calibration op in plain torch: the definition, the oracle, and the backend of last resort.

T tokens, N out features, K in features, S sequences, U units. Products are formed in row panels
that fit a cache, so no tensor of the size of the weight is ever written. float64 inputs give
float64 results, which is what tests compare with; other inputs are computed and returned in fp32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PANEL_ELEMENTS = 1 << 19  # 2 MiB of fp32: below it the products are too thin, above it leaves the caches


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
                    first = start // unit_size
                    sums = values.sum(1).view(-1, unit_size).sum(1)
                    result[which, index, first : first + len(sums)] = sums
    if bias is not None:
        result += bias_salience(dy, bias, spans, unit_size, want, scale)
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
        for x_n, dy_n in sequences:
            s = panel * (dy_n[:, rows].T @ x_n) * scale
            mean += s / len(sequences)
            square += s.square() / len(sequences)
        for which, name in enumerate(want):
            values = coupled_order(name, mean, square)
            if axis == "in":
                result[which] += values.sum(0).view(-1, unit_size).sum(1)
            else:
                first = start // unit_size
                sums = values.sum(1).view(-1, unit_size).sum(1)
                result[which, first : first + len(sums)] = sums
    if bias is not None:
        result += coupled_bias_salience(dy, bias, spans, unit_size, want, scale)
    return result


def bias_salience(dy: Tensor, bias: Tensor, spans: Tensor, unit_size: int, want: Sequence[str], scale: float) -> Tensor:
    """(len(want), S, U): f(s) summed per unit, s = scale * bias * sum_t dy; what biases add to their rows' units."""
    s = _bias_terms(dy, bias, spans, scale)
    return torch.stack([_ELEMENT[name](s) for name in want]).unflatten(2, (-1, unit_size)).sum(3)


def coupled_bias_salience(
    dy: Tensor, bias: Tensor, spans: Tensor, unit_size: int, want: Sequence[str], scale: float
) -> Tensor:
    """(len(want), U): as ``bias_salience`` for the coupled form."""
    s = _bias_terms(dy, bias, spans, scale)
    mean, square = s.mean(0), s.square().mean(0)  # [N]
    return torch.stack([coupled_order(name, mean, square) for name in want]).unflatten(1, (-1, unit_size)).sum(2)


def _bias_terms(dy: Tensor, bias: Tensor, spans: Tensor, scale: float) -> Tensor:
    """(S, N): scale * bias * the sum of each sequence's rows of dy."""
    dtype = compute_dtype(dy)
    return torch.stack([dy[a:b].sum(0, dtype=dtype) for a, b in spans.tolist()]) * bias.to(dtype) * scale


def coupled_order(name: str, mean: Tensor, square: Tensor) -> Tensor:
    """|mean_n s|, |mean_n s^2| or |mean_n s - mean_n s^2 / 2| from the two means."""
    return {"first": mean, "second": square, "mixed": mean - 0.5 * square}[name].abs()


def activation_salience(y: Tensor, dy: Tensor, spans: Tensor, unit_size: int) -> Tensor:
    """(S, U): per sequence, the signed sum over its tokens and each unit's features of y * dy."""
    dtype = compute_dtype(y)
    rows = [torch.einsum("tk,tk->k", y[a:b].to(dtype), dy[a:b].to(dtype)) for a, b in spans.tolist()]
    return torch.stack(rows).unflatten(1, (-1, unit_size)).sum(2)


def activation_statistics(x: Tensor, spans: Tensor, shift: Tensor | None, want: Sequence[str]) -> Tensor:
    """(len(want), S, K): per sequence sums over tokens of x - shift and its square, max |x| and the sum of |x|."""
    dtype = compute_dtype(x)
    result = torch.empty(len(want), len(spans), x.shape[1], dtype=dtype, device=x.device)
    for index, (a, b) in enumerate(spans.tolist()):
        rows = x[a:b].to(dtype)
        moved = rows if shift is None else rows - shift.to(dtype)
        for which, name in enumerate(want):
            if name == "absmax":
                result[which, index] = rows.abs().amax(0)
            else:
                terms = moved if name == "sum" else moved.square() if name == "square" else rows.abs()
                result[which, index] = terms.sum(0)
    return result
