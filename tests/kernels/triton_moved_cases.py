"""Levels moved and weights written out by Triton: interpreted by test_moved_levels.py, on a device too."""

import pytest
import torch

from saap_kernels import moved_levels, use_backend
from saap_kernels.moved_levels import panels
from saap_kernels.packed import round_up
from saap_kernels.triton_moved import moved
from tests.kernels.moved_cases import SHAPES, case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)


CASES = [  # every shape, every way to group, every dtype: not all of each with each, for the interpreter's sake
    *((shape, bits, 32, torch.float32) for shape in SHAPES for bits in (8, 4)),
    *((SHAPES[1], 4, group, dtype) for group in (96, 128) for dtype in DTYPES),
]


@pytest.mark.parametrize(("shape", "bits", "group", "dtype"), CASES, ids=str)
def test_moved_weights(shape, bits: int, group: int, dtype) -> None:
    packed, change = case(shape, bits, group, dtype)
    rows, columns = shape
    with use_backend("reference"):
        levels = moved_levels.moved_levels(packed, change)
        values, plain = (torch.cat([each for _, each in panels(packed, c, torch.float32)]) for c in (change, None))
    size = round_up(rows, 64), round_up(columns, 64)
    on_device = packed.to(DEVICE), *(each.to(DEVICE) for each in change)
    found = moved(*on_device, False, torch.full(size, torch.nan, device=DEVICE)).cpu()
    # sums in another order put a level beside a half on its other side
    differing = found[:rows, :columns] != levels
    assert float(differing.float().mean()) < 1e-3 and float((found[:rows, :columns] - levels).abs().max()) <= 1
    assert not found[rows:].any() and not found[:, columns:].any()
    found = moved(*on_device, True, torch.full(size, torch.nan, device=DEVICE)).cpu()
    torch.testing.assert_close(  # one rounding of fp32 less
        found[:rows, :columns][~differing], values[~differing], rtol=1e-6, atol=1e-6
    )
    assert not found[rows:].any() and not found[:, columns:].any()
    found = moved(on_device[0], None, None, True, torch.empty(size, device=DEVICE, dtype=dtype)).cpu()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]  # of the result's last bit
    torch.testing.assert_close(found[:rows, :columns].float(), plain, rtol=tolerance, atol=1e-6)
