"""Low-rank adapters of weights quantised in groups, whose merging is exact: they learn zero points and levels.

Zero points, after QA-LoRA (arXiv 2309.14717): y = W~ x + s B A pool(x) with W~ = scale * Q + zero and pool(x) the sum
of x over each group of inputs is y = (scale * Q + zero + s B A) x. Levels, after LR-QAT (arXiv 2406.06385): Q becomes
the level nearest to Q + s V U / scale. Products run here with the zero points and levels that merging would leave, in
the dtype in which they are stored; roundings pass gradients on as they are (straight through), and so do the ends of
the range of levels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saap_kernels import PackedWeight, linear
from saap_kernels.group_quantise import LEVELS
from saap_kernels.packed import from_nibbles, with_levels
from saap_kernels.reference_linear import linear_gradients


@dataclass(frozen=True)
class Factors:
    """What an adapter learns of a weight (N, K).

    Zero points change by s b @ a, a (r, G) and b (N, r); levels by s v @ u / scale, u (r, K) and v (N, r), or None.
    """

    a: Tensor
    b: Tensor
    u: Tensor | None
    v: Tensor | None
    scaling: float


def pool(x: Tensor, group_size: int) -> Tensor:
    """Sums of x (..., K) over groups of inputs: (..., ceil(K / group_size))."""
    columns = x.shape[-1]
    groups = -(-columns // group_size)
    return F.pad(x, (0, groups * group_size - columns)).unflatten(-1, (groups, group_size)).sum(-1)


@torch.no_grad()
def merged(packed: PackedWeight, factors: Factors) -> PackedWeight:
    """``packed`` (N, K) with the adapter in its zero points and levels: as many bits, the same scales."""
    assert packed.zero is not None and packed.scale is not None
    rows = packed.rows
    zero = packed.zero.clone()
    change = factors.scaling * (factors.b @ factors.a)  # [N, G]
    zero[:rows] = (zero[:rows].to(change.dtype) + change).to(zero.dtype)
    found = replace(packed, zero=zero)
    if factors.u is None or factors.v is None:
        return found
    steps, lowest = LEVELS[packed.bits]
    data = from_nibbles(packed.data) if packed.bits == 4 else packed.data
    scale = packed.scale[:rows].to(change.dtype).repeat_interleave(packed.group_size or 1, -1)[:, : packed.columns]
    moved = factors.scaling * (factors.v @ factors.u)  # [N, K]
    moved = torch.where(scale > 0, moved / torch.where(scale > 0, scale, 1.0), 0.0)
    levels = (data[:rows, : packed.columns] + moved).round_().clamp_(lowest, lowest + steps)
    return with_levels(found, levels)


def adapted_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None, factors: Factors) -> Tensor:
    """x (..., K) -> (..., N) through ``packed`` (N, K) with an adapter; differentiable in x, bias and the factors.

    Bitwise what ``linear`` gives of ``merged``. The backward pass keeps ``pool(x)``, and x itself for levels only.
    """
    rows = x.reshape(-1, x.shape[-1])
    tensors = (factors.a, factors.b, factors.u, factors.v)
    found: Tensor = _Adapted.apply(rows, bias, *tensors, packed, factors.scaling)  # type: ignore[no-untyped-call]  # torch's own apply has no types
    return found.view(*x.shape[:-1], packed.rows)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        *tensors, packed, scaling = rest
        a = tensors[0]
        pooled = pool(x.to(a.dtype), packed.group_size)
        ctx.packed, ctx.scaling = packed, scaling
        ctx.save_for_backward(pooled, None if tensors[2] is None else x, *tensors)
        a, b, u, v = tensors
        return linear(x, merged(packed, Factors(a, b, u, v, scaling)), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # one gradient comes
        pooled, x, *tensors = ctx.saved_tensors  # [T, G], [T, K]
        a, b, u, v = tensors
        wanted = ctx.needs_input_grad
        weight = merged(ctx.packed, Factors(a, b, u, v, ctx.scaling))  # again, rather than kept for every Linear
        dx = linear_gradients(dy, dy, weight, {"x": wanted[0]})["x"]  # of the second it reads the dtype alone
        dbias = dy.sum(0) if wanted[1] else None
        d = dy.to(a.dtype)
        found = [
            *_factors_gradients(d, pooled, a, b),
            *((None, None) if x is None else _factors_gradients(d, x.to(a.dtype), u, v)),
        ]
        factors = [ctx.scaling * each if need else None for each, need in zip(found, wanted[2:6], strict=True)]
        return dx, dbias, *factors, None, None


def _factors_gradients(dy: Tensor, inputs: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = up down inputs by down (r, K) and up (N, r); dy (T, N), inputs (T, K)."""
    return (dy @ up).T @ inputs, dy.T @ (inputs @ down.T)
