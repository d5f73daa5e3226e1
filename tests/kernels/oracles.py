"""Calibration ops by their definition: explicit per-sequence dW in float64."""

import torch
from torch import Tensor

FUNCTIONS = {"abs": torch.abs, "square": torch.square, "mixed": lambda s: (s - s**2 / 2).abs()}


def saliences(x, dy, w, spans, bias=None, scale=1.0) -> list[tuple[Tensor, Tensor | None]]:
    """[(s of the weight (N, K), s of the bias (N,))] per sequence, float64."""
    result = []
    for start, stop in spans.tolist():
        xs, dys = x[start:stop].double(), dy[start:stop].double()
        weight = w.double() * (dys.T @ xs) * scale
        result.append((weight, None if bias is None else bias.double() * dys.sum(0) * scale))
    return result


def group(weight: Tensor, bias: Tensor | None, axis: str, unit_size: int) -> Tensor:
    """Sum (N, K) entries and (N,) biases into (U,) units."""
    lines = weight.sum(1 if axis == "out" else 0)
    if bias is not None:
        lines = lines + bias
    return torch.stack([part.sum() for part in lines.split(unit_size)])


def weight_salience(x, dy, w, spans, *, axis, unit_size=1, bias=None, want=("abs", "square", "mixed"), scale=1.0):
    rows = []
    for name in want:
        f = FUNCTIONS[name]
        found = saliences(x, dy, w, spans, bias, scale)
        rows.append(torch.stack([group(f(s), None if b is None else f(b), axis, unit_size) for s, b in found]))
    return torch.stack(rows)


def coupled_salience(x, dy, w, spans, *, axis, unit_size=1, bias=None, want=("first", "second", "mixed")):
    found = saliences(x, dy, w, spans, bias)
    first = sum(s for s, _ in found) / len(found)
    second = sum(s.square() for s, _ in found) / len(found)
    values = {"first": first, "second": second, "mixed": first - second / 2}
    edges = dict.fromkeys(values)
    if bias is not None:
        b1 = sum(b for _, b in found) / len(found)
        b2 = sum(b.square() for _, b in found) / len(found)
        edges = {"first": b1.abs(), "second": b2.abs(), "mixed": (b1 - b2 / 2).abs()}
    return torch.stack([group(values[name].abs(), edges[name], axis, unit_size) for name in want])
