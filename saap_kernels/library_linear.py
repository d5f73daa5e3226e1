"""The inference ops by torch's GEMM over the padded storage: no copy of the weight, extents that suit the GEMM.

On GPUs, extents that are no multiple of 8 keep cuBLAS from its fast kernels, whatever the pitch: there K and N are the
padded ones, at the price of a copy of x or of the result, which are small beside the product. GEMMs of a CPU mind
neither. Quantised weights are written out in panels that stay in its caches, on a GPU as a whole.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from saap_kernels import _ext
from saap_kernels.packed import PackedWeight, from_nibbles, unpacked
from saap_kernels.reference_linear import activate

PANEL_ELEMENTS = 1 << 18  # written out at once: 1 MiB of fp32 stays in a core's L2 cache
CUDA_PANEL_ELEMENTS = 1 << 24  # 64 MiB of fp32 beside the whole weight
ALIGNED = 8  # elements: 16 bytes of 16-bit values, what cuBLAS asks of every extent


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """(T, N): x W' + b in the dtype of x."""
    return _narrow(_product(x, weight, bias), weight.rows).contiguous()


def gated_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """act(x Wg' + bg) * (x Wu' + bu), (T, F'): one product with both, F rounded up to 64, zero beyond F."""
    stacked = _stacked(weight)
    padded = stacked.rows // 2
    if bias is not None:
        bias = functional.pad(bias, (0, padded - weight.rows)).flatten()
    both = _product(x, stacked, bias)
    if both.is_cuda and both.dtype.itemsize <= 4 and _ext.triton_status()[0]:
        from saap_kernels import triton_gating

        return triton_gating.gated_product(both, weight.rows, activation)
    gate, up = both[:, :padded], both[:, padded:]
    h = torch.mul(activate(gate, activation), up)
    if padded != weight.rows:
        h[:, weight.rows :] = 0  # NaN and infinity of x reach the padding as 0 * NaN
    return h


def linear_of_padded(h: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``linear`` of h (T, K') as ``gated_linear`` leaves it: K rounded up to 64, zero beyond K."""
    return _narrow(_product(h, weight, bias), weight.rows).contiguous()


def _stacked(weight: PackedWeight) -> PackedWeight:
    """(2, F, K) as (2 F', K): the padding of gate lies between both."""
    data, scale, zero = (
        None if each is None else each.flatten(0, 1) for each in (weight.data, weight.scale, weight.zero)
    )
    assert data is not None
    return PackedWeight(data, (len(data), weight.columns), weight.bits, weight.group_size, scale, zero)


def _narrow(matrix: Tensor, columns: int) -> Tensor:
    """Without its padding; a slice costs as much as a small product's launch."""
    return matrix if matrix.shape[1] == columns else matrix[:, :columns]


def _product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """(T, N) or (T, N') of x (T, K), or (T, K') with zeros beyond K; ``bias`` (N,)."""
    if x.is_cuda:
        return whole_product(x, _values(weight, x.dtype), weight, bias)
    if weight.bits == 16 and weight.data.dtype == x.dtype and (x.dtype.itemsize > 2 or multiplies(x.dtype)):
        values = _narrow(weight.data, weight.columns)[: weight.rows]
        return functional.linear(_narrow(x, weight.columns), values, bias)
    return _product_by_panels(_narrow(x, weight.columns), weight, bias)


def whole_product(x: Tensor, values: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """By one GEMM over ``values`` (N', P), with the padded extents where those of the weight are not aligned."""
    rows, columns = weight.rows, weight.columns
    if columns % ALIGNED == 0:
        x, values = _narrow(x, columns), _narrow(values, columns)
    elif x.shape[1] < values.shape[1]:  # 16-bit rows are as long as those of a padded h; quantised ones may be longer
        x = functional.pad(x, (0, values.shape[1] - x.shape[1]))
    if rows % ALIGNED == 0:
        return functional.linear(x, values[:rows], bias)
    if bias is not None:
        bias = functional.pad(bias, (0, len(values) - rows))
    return functional.linear(x, values, bias)


def _product_by_panels(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """(T, N) by rows of the weight that are written out in fp32 (fp64 for fp64) and multiplied at once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    result = wide.new_empty(len(x), weight.rows)
    for first, panel in _panels(weight, wide.dtype, weight.rows):
        torch.mm(wide, panel[:, : weight.columns].T, out=result[:, first : first + len(panel)])
    if bias is not None:
        result += bias
    return result.to(x.dtype)


def _values(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The padded weight in ``dtype``, (N', P), zero beyond N and K; the stored one where it is in that dtype."""
    if weight.bits == 16:
        return weight.data.to(dtype)
    pitch = weight.data.shape[1] * 8 // weight.bits
    values = torch.empty(len(weight.data), pitch, dtype=dtype, device=weight.data.device)
    for first, panel in _panels(weight, dtype, len(values)):
        values[first : first + len(panel)] = panel
    return values


def _panels(weight: PackedWeight, dtype: torch.dtype, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, its values (rows of the panel, P)), zero beyond K, of the first ``rows`` of a matrix."""
    step = max(1, (CUDA_PANEL_ELEMENTS if weight.data.is_cuda else PANEL_ELEMENTS) // weight.columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        scale, zero = (None if each is None else each[part] for each in (weight.scale, weight.zero))
        yield (
            first,
            _written_out(
                PackedWeight(weight.data[part], weight.shape, weight.bits, weight.group_size, scale, zero), dtype
            ),
        )


def _written_out(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``unpacked``, in one fused pass where whole groups fill a row's pitch, as the usual ones do.

    Fusing leaves one rounding out, which is within the errors of fp32, but not to the bit what fp64 is checked against.
    """
    group, scale, zero = weight.group_size, weight.scale, weight.zero
    pitch = weight.data.shape[1] * 8 // weight.bits
    if scale is None or zero is None or group is None or pitch % group or dtype == torch.float64:
        return unpacked(weight, dtype)
    quantised = from_nibbles(weight.data) if weight.bits == 4 else weight.data
    groups = scale.shape[1]
    values = torch.zeros(len(quantised), pitch, device=quantised.device)
    torch.addcmul(
        zero.float()[..., None],
        scale.float()[..., None],
        quantised.unflatten(1, (-1, group))[:, :groups].float(),
        out=values.unflatten(1, (-1, group))[:, :groups],
    )
    values[:, weight.columns :] = 0
    return values.to(dtype)


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for products of a 16-bit dtype; torch is slow without, fp32 is not."""
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.cpu._is_amx_fp16_supported())
