"""Levels that a low-rank change moves: the C++ code, for any processor and AVX2's, against the definition in fp64."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saap_kernels import PackedWeight, _ext, moved_levels, unpack, use_backend
from saap_kernels.group_quantise import LEVELS
from saap_kernels.moved_levels import Change, panels
from tests.kernels.moved_cases import SHAPES, case


def dense_levels(packed: PackedWeight, change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in float64 before it is rounded, and where there are no steps and it means nothing."""
    rows, columns = packed.shape
    steps, lowest = LEVELS[packed.bits]
    scale, zero = (
        each[:rows].double().repeat_interleave(packed.group_size, 1)[:, :columns]
        for each in (packed.scale, packed.zero)
    )
    plain = ((unpack(packed, dtype=torch.float64) - zero) / scale).round()
    exact = plain + (change.up.double() @ change.down.double()) / scale
    return exact.clamp(lowest, lowest + steps), scale == 0


@pytest.fixture(params=["portable", "AVX2", "torch"])
def code(request, monkeypatch):
    """Each of the three codes, in panels of 64 rows."""
    monkeypatch.setattr(moved_levels, "PANEL_ELEMENTS", 1)
    native = _ext.native()
    if request.param == "torch":
        with use_backend("reference"):
            yield
        return
    if request.param == "portable":
        names = ("moved_rows_f32", "unpack_rows_f32")
        found = SimpleNamespace(**{name: partial(getattr(native, name), portable=True) for name in names})
        monkeypatch.setattr(_ext, "native", lambda: found)
    elif not native.has_avx2():
        pytest.skip("this processor has no AVX2")
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, 96])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_levels_and_values_are_those_of_the_formula(shape, bits: int, group: int, dtype, code) -> None:
    packed, change = case(shape, bits, group, dtype)
    rows, columns = shape
    exact, flat = dense_levels(packed, change)
    found = moved_levels.moved_levels(packed, change)
    # fp32 moves the sum by less than 1e-3 of a level, so that none is further from it than half of one and that
    assert bool(((found - exact).abs() <= 0.501)[~flat].all()) and torch.equal(found, found.round())
    plain = moved_levels.moved_levels(packed, Change(torch.zeros_like(change.up), change.down))
    assert torch.equal(found[flat], plain[flat])
    scale, zero = (
        each[:rows].double().repeat_interleave(group, 1)[:, :columns] for each in (packed.scale, packed.zero)
    )
    values = torch.cat([each.clone() for _, each in panels(packed, change, torch.float32)])
    torch.testing.assert_close(values.double(), scale * found + zero, rtol=1e-6, atol=1e-6)  # two roundings of fp32
    unmoved = torch.cat([each.clone() for _, each in panels(packed, None, torch.float32)])
    torch.testing.assert_close(unmoved, unpack(packed, dtype=torch.float32), rtol=1e-6, atol=1e-7)  # one rounding less


@pytest.mark.parametrize("bits", [8, 4])
def test_threads_and_panels_do_not_change_a_bit(bits: int, monkeypatch) -> None:
    packed, change = case((130, 515), bits, 32, torch.float32)
    wanted = moved_levels.moved_levels(packed, change)
    values = torch.cat([each.clone() for _, each in panels(packed, change, torch.float32)])
    monkeypatch.setattr(moved_levels, "PANEL_ELEMENTS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(moved_levels.moved_levels(packed, change), wanted)
        assert torch.equal(torch.cat([each.clone() for _, each in panels(packed, change, torch.float32)]), values)
    finally:
        torch.set_num_threads(threads)


def test_float64_changes_are_computed_in_float64() -> None:
    packed, change = case((70, 99), 4, 32, torch.float64)
    found = moved_levels.moved_levels(packed, Change(*(each.double() for each in change)))
    exact, flat = dense_levels(packed, change)
    assert found.dtype == torch.float64 and torch.equal(found[~flat], exact.round()[~flat])


CASES = Path(__file__).with_name("triton_moved_cases.py")


@pytest.mark.parametrize("options", [(), ("-p", "tests.kernels.compile_only")], ids=["interpreted", "compiled"])
def test_triton(options) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(CASES)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | ({} if options else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
