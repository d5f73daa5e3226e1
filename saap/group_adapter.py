"""Group-wise low-rank adapters: they learn the zero points of a quantised weight, so that merging them is exact.

After QA-LoRA (arXiv 2309.14717): y = W~ x + s B A pool(x) with W~ = scale * Q + zero and pool(x) the sum of x over each
group of inputs. That is y = (scale * Q + zero + s B A) x, so the product runs here with the zero point that merging
would leave, in the dtype in which it is stored; its rounding passes gradients on as they are.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from saap_kernels import PackedWeight, linear
from saap_kernels.reference_linear import linear_gradients


def pool(x: Tensor, group_size: int) -> Tensor:
    """Sums of x (..., K) over groups of inputs: (..., ceil(K / group_size))."""
    columns = x.shape[-1]
    groups = -(-columns // group_size)
    return F.pad(x, (0, groups * group_size - columns)).unflatten(-1, (groups, group_size)).sum(-1)


def with_adapter(packed: PackedWeight, a: Tensor, b: Tensor, scaling: float) -> PackedWeight:
    """``packed`` (N, K) with scaling * b @ a in its zero points; a (r, G) and b (N, r)."""
    assert packed.zero is not None
    change = scaling * (b @ a)  # [N, G]
    padding = packed.zero.shape[0] - len(change)
    zero = (packed.zero.to(change.dtype) + F.pad(change, (0, 0, 0, padding))).to(packed.zero.dtype)
    return replace(packed, zero=zero)


def adapted_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """x (..., K) -> (..., N) through ``packed`` (N, K) with the adapter a (r, G), b (N, r); all but Q is differentiable.

    Bitwise what ``linear`` gives of ``with_adapter``. What the backward pass keeps of x is ``pool(x)``.
    """
    rows = x.reshape(-1, x.shape[-1])
    found: Tensor = _Adapted.apply(rows, a, b, bias, packed, scaling)
    return found.view(*x.shape[:-1], packed.rows)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]  # the arguments of apply
        ctx, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, packed: PackedWeight, scaling: float
    ) -> Tensor:
        merged = with_adapter(packed, a, b, scaling)
        assert packed.group_size is not None
        ctx.merged, ctx.scaling = merged, scaling
        ctx.save_for_backward(pool(x.to(a.dtype), packed.group_size), a, b)
        return linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # one gradient comes
        pooled, a, b = ctx.saved_tensors  # [T, G], [r, G], [N, r]
        wanted = ctx.needs_input_grad
        dx = linear_gradients(dy, dy, ctx.merged, {"x": wanted[0]})["x"]  # of x it reads the dtype alone
        d = dy.to(a.dtype)
        da = ctx.scaling * ((d @ b).T @ pooled) if wanted[1] else None
        db = ctx.scaling * (d.T @ (pooled @ a.T)) if wanted[2] else None
        return dx, da, db, dy.sum(0) if wanted[3] else None, None, None
