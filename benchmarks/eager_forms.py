"""What users write instead of the calibration ops: the first form that comes to mind, and the strongest one.

Sequences are equally long here. Products are in the operands' dtype, which cuBLAS accumulates in fp32. Every
form takes its inner function from outside, so that ``torch.compile`` can replace it: the product itself stays
cuBLAS's either way, and one compilation serves any number of tokens.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from saap_kernels import reference

PANEL_BYTES = {"cuda": 16 << 20, "cpu": 2 << 20}  # of one panel of dW: it and its copy stay in the L2 cache

Reduce = Callable[[Tensor, Tensor, int], Tensor]  # dW, w, dimension to sum -> (3, lines)


def reduce_product(product: Tensor, w: Tensor, dim: int) -> Tensor:
    """(3, lines): sums of |s|, s^2 and |s - s^2 / 2| of s = w * dW as a user writes them first."""
    s = (w * product).float()
    square = s * s
    return torch.stack([f.sum(dim) for f in (s.abs(), square, (s - 0.5 * square).abs())])


def reduce_by_norms(product: Tensor, w: Tensor, dim: int) -> Tensor:
    """The same in five kernels and no fp32 tensor: norms read s once and add in fp32; ``product`` is overwritten."""
    s = product.mul_(w)
    found = [vector_norm(s, 1, dim, dtype=torch.float32), vector_norm(s, 2, dim, dtype=torch.float32).square_()]
    mixed = torch.addcmul(s, s, s, value=-0.5)
    return torch.stack([*found, vector_norm(mixed, 1, dim, dtype=torch.float32)])


def whole_salience(
    x: Tensor, dy: Tensor, w: Tensor, sequences: int, axis: str, unit: int, reduce: Reduce = reduce_product
) -> Tensor:
    """weight_salience, (3, S, U), by one dW per sequence."""
    dim = 1 if axis == "out" else 0
    pairs = zip(x.chunk(sequences), dy.chunk(sequences), strict=True)
    return torch.stack([reduce(dy_n.T @ x_n, w, dim).unflatten(1, (-1, unit)).sum(2) for x_n, dy_n in pairs], 1)


def panel_rows(rows: int, columns: int, unit: int, elements: int) -> int:
    """Rows of one panel: the largest divisor of ``rows`` that is a multiple of ``unit`` and fits ``elements``."""
    fitting = (size for size in range(unit, rows + 1, unit) if rows % size == 0 and size * columns <= elements)
    return max(fitting, default=unit)


def tiled_salience(
    x: Tensor, dy: Tensor, w: Tensor, sequences: int, axis: str, unit: int, reduce: Reduce = reduce_by_norms
) -> Tensor:
    """weight_salience, (3, S, U), by panels of dW that stay in the cache."""
    out = axis == "out"
    step, results = panel_rows(*w.shape, unit if out else 1, PANEL_BYTES[w.device.type] // w.element_size()), []
    for x_n, dy_n in zip(x.chunk(sequences), dy.chunk(sequences), strict=True):
        parts = [
            reduce(dy_n[:, row : row + step].T @ x_n, w[row : row + step], 1 if out else 0)
            for row in range(0, len(w), step)
        ]
        whole = torch.cat(parts, 1) if out else torch.stack(parts).sum(0)
        results.append(whole.unflatten(1, (-1, unit)).sum(2))
    return torch.stack(results, 1)


def reference_salience(x: Tensor, dy: Tensor, w: Tensor, sequences: int, axis: str, unit: int) -> Tensor:
    """weight_salience, (3, S, U), by the definition in fp32 panels: the strongest form on a CPU."""
    spans = torch.arange(0, len(x) + 1, len(x) // sequences, dtype=torch.int32).unfold(0, 2, 1)
    return reference.weight_salience(x, dy, w, spans, axis, unit, None, ["abs", "square", "mixed"], 1.0)


def add_product(product: Tensor, w: Tensor, mean: Tensor, square: Tensor) -> None:
    """Add s = w * dW of one sequence, and its square, to the accumulators in fp32."""
    s = (w * product).float()
    mean.add_(s)
    square.add_(s * s)


def coupled_orders(mean: Tensor, square: Tensor, count: int, dim: int) -> Tensor:
    """(3, lines): sums of |mean|, |mean square| and |mean - mean square / 2| of accumulated sums."""
    mean, square = mean / count, square / count
    return torch.stack([f.abs().sum(dim) for f in (mean, square, mean - 0.5 * square)])


def coupled(
    x: Tensor, dy: Tensor, w: Tensor, sequences: int, axis: str, unit: int,
    add: Callable[..., None] = add_product, orders: Callable[..., Tensor] = coupled_orders,
) -> Tensor:  # fmt: skip
    """coupled_salience, (3, U), by one dW per sequence and two accumulators of the size of ``w`` in fp32."""
    mean, square = (torch.zeros(w.shape, dtype=torch.float32, device=w.device) for _ in range(2))
    for x_n, dy_n in zip(x.chunk(sequences), dy.chunk(sequences), strict=True):
        add(dy_n.T @ x_n, w, mean, square)
    return orders(mean, square, sequences, 1 if axis == "out" else 0).unflatten(1, (-1, unit)).sum(2)


def salience(y: Tensor, dy: Tensor, sequences: int) -> Tensor:
    """activation_salience, (S, K), as a user writes it first, in fp32."""
    return (y.float() * dy.float()).unflatten(0, (sequences, -1)).sum(1)


def mask_gradients(y: Tensor, dy: Tensor, sequences: int) -> Tensor:
    """activation_salience as hooks form the gradient of a mask of ones: one product, one sum in fp32."""
    return (y * dy).unflatten(0, (sequences, -1)).sum(1, dtype=torch.float32)


def statistics(x: Tensor, sequences: int) -> tuple[Tensor, ...]:
    """activation_statistics, three of (S, K): sum, sum of squares, largest |x|, in fp32."""
    rows = x.float().unflatten(0, (sequences, -1))
    return rows.sum(1), rows.square().sum(1), rows.abs().amax(1)


def statistics_by_norms(x: Tensor, sequences: int) -> tuple[Tensor, ...]:
    """The same in three kernels that read x and write nothing of its size."""
    rows = x.unflatten(0, (sequences, -1))
    norms = (vector_norm(rows, order, 1, dtype=torch.float32) for order in (2, torch.inf))
    return rows.sum(1, dtype=torch.float32), *norms


def salience_statistics(x: Tensor, dx: Tensor, sequences: int) -> tuple[Tensor, ...]:
    """activation_salience_statistics as a user writes it first."""
    return salience(x, dx, sequences), *statistics(x, sequences)


def strongest_salience_statistics(x: Tensor, dx: Tensor, sequences: int) -> tuple[Tensor, ...]:
    """The same by a mask's gradient and norms."""
    return mask_gradients(x, dx, sequences), *statistics_by_norms(x, sequences)


@cache
def compiled(name: str) -> Callable[..., Any]:
    """A function of this module under torch.compile, compiled once for every shape that it meets."""
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 1000
    return torch.compile(globals()[name], dynamic=False)
