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

from saap_kernels import PackedWeight, library_linear, linear
from saap_kernels.moved_levels import Change, moved_levels, panels, written_out
from saap_kernels.packed import with_levels


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
    found = _with_zero_points(packed, factors)
    change = _change(factors)
    return found if change is None else with_levels(found, moved_levels(packed, change))


def adapted_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, factors: Factors, *, exact: bool = True
) -> Tensor:
    """x (..., K) -> (..., N) through ``packed`` (N, K) with an adapter; differentiable in x, bias and the factors.

    Bitwise what ``linear`` gives of ``merged`` if ``exact``; else the same weight is written out and multiplied at
    once, which is faster for many tokens and differs by the roundings of sums. The weight is made anew in the backward
    pass, which keeps no more than x.
    """
    rows = x.reshape(-1, x.shape[-1])
    tensors = (factors.a, factors.b, factors.u, factors.v)
    with torch.autocast(x.device.type, enabled=False):  # it would round the change that is merged in the end
        found: Tensor = _Adapted.apply(rows, bias, *tensors, packed, factors.scaling, exact)  # type: ignore[no-untyped-call]  # torch's own apply has no types
    return found.view(*x.shape[:-1], packed.rows)


def _with_zero_points(packed: PackedWeight, factors: Factors) -> PackedWeight:
    assert packed.zero is not None
    rows, zero = packed.rows, packed.zero.clone()
    change = factors.scaling * (factors.b @ factors.a)  # [N, G]
    zero[:rows] = (zero[:rows].to(change.dtype) + change).to(zero.dtype)
    return replace(packed, zero=zero)


def _change(factors: Factors) -> Change | None:
    """Of the weight, which moves its levels."""
    if factors.u is None or factors.v is None:
        return None
    return Change(factors.scaling * factors.v, factors.u)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        a, b, u, v, packed, scaling, exact = rest
        factors = Factors(a, b, u, v, scaling)
        inputs = pool(x.to(a.dtype), packed.group_size) if u is None else x  # what gradients of factors need
        ctx.save_for_backward(inputs, a, b, u, v)
        ctx.packed, ctx.scaling, ctx.dtype = packed, scaling, x.dtype
        bias = None if bias is None else bias.to(x.dtype)
        if exact:
            return linear(x, merged(packed, factors), bias)
        found = _product(x, _with_zero_points(packed, factors), _change(factors))
        return found if bias is None else found.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # one gradient comes
        inputs, a, b, u, v = ctx.saved_tensors  # [T, K], or [T, G] of zero points alone
        factors, needs = Factors(a, b, u, v, ctx.scaling), ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 6
        with torch.autocast(dy.device.type, enabled=False):
            if needs[0]:
                weight = _with_zero_points(ctx.packed, factors)  # again, rather than kept for every Linear
                found[0] = _product_with_columns(dy, weight, _change(factors)).to(ctx.dtype)
            if needs[1]:
                found[1] = dy.sum(0)
            if any(needs[2:6]):
                found[2:] = _factors_gradients(dy, inputs, factors, ctx.packed.group_size)
        return *(each if need else None for each, need in zip(found, needs[:6], strict=True)), None, None, None


def _product(x: Tensor, weight: PackedWeight, change: Change | None) -> Tensor:
    """x W' (T, N)."""
    if x.is_cuda:
        return _whole_product(x, weight, change)
    wide = _wide(x)
    result = wide.new_empty(len(x), weight.rows)
    for rows, values in panels(weight, change, wide.dtype):
        torch.mm(wide, values.T, out=result[:, rows])
    return result.to(x.dtype)


def _product_with_columns(dy: Tensor, weight: PackedWeight, change: Change | None) -> Tensor:
    """dy W (T, K)."""
    if dy.is_cuda:
        return _whole_product_with_columns(dy, weight, change)
    wide = _wide(dy)
    result = None
    for rows, values in panels(weight, change, wide.dtype):
        result = wide[:, rows] @ values if result is None else result.addmm_(wide[:, rows], values)
    assert result is not None
    return result


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least: products of 16 bits are slower on most processors."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _whole_product(x: Tensor, weight: PackedWeight, change: Change | None) -> Tensor:
    """As ``_product``, by one GEMM in the dtype of x with extents that suit a GPU's."""
    found = library_linear.whole_product(x, written_out(weight, change, x.dtype), weight, None)
    return found[:, : weight.rows].contiguous()


def _whole_product_with_columns(dy: Tensor, weight: PackedWeight, change: Change | None) -> Tensor:
    """As ``_product_with_columns``, like ``_whole_product``."""
    values = written_out(weight, change, dy.dtype)  # [N', K']
    if weight.rows % library_linear.ALIGNED == 0:
        values = values[: weight.rows]
    else:
        dy = F.pad(dy, (0, len(values) - weight.rows))
    if weight.columns % library_linear.ALIGNED == 0:
        values = values[:, : weight.columns]
    return (dy @ values)[:, : weight.columns].contiguous()


def _factors_gradients(dy: Tensor, inputs: Tensor, factors: Factors, group_size: int) -> list[Tensor | None]:
    """Of a, b, u and v; dy (T, N), inputs (T, K), or pooled (T, G) of zero points alone. dy is read twice in all."""
    a, b, u, v = factors.a, factors.b, factors.u, factors.v
    scaling, dy, inputs = factors.scaling, dy.to(a.dtype), inputs.to(a.dtype)
    if u is None or v is None:
        return [(dy @ (scaling * b)).T @ inputs, dy.T @ (inputs @ (scaling * a).T), None, None]
    split = len(a), len(u)
    pooled = pool(inputs, group_size)
    up = dy @ (scaling * torch.cat([b, v], 1))  # [T, r of both]
    down = torch.cat([pooled @ a.T, inputs @ u.T], 1).mul_(scaling)
    da, du = ((each.T @ x) for each, x in zip(up.split(split, 1), (pooled, inputs), strict=True))
    db, dv = (dy.T @ down).split(split, 1)
    return [da, db, du, dv]
