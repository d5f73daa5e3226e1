"""The library's GEMM over padded storage: a GPU's way on CPU tensors, what is copied, what stays zero."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from saap_kernels import gated_linear, library_linear, linear, unpack, use_backend
from saap_kernels.library_linear import _panels, _values, whole_product
from tests.kernels import linear_oracles as oracles
from tests.kernels.linear_oracles import SHAPES, assert_as_exact_as_eager
from tests.kernels.test_inference_ops import case, eager

STORED = [(16, None), (8, None), (4, None), (8, 32), (4, 96)]  # groups of 96 do not fill a pitch


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_way_of_a_gpu(shape, stored) -> None:
    x, packed, bias = case(shape, torch.float32, *stored)
    for given in (x, functional.pad(x, (0, -x.shape[1] % 64))):  # and as gated_linear leaves it
        found = whole_product(given, _values(packed, x.dtype), packed, bias)
        assert found.shape[1] % 8 == 0 or found.shape[1] == packed.rows
        found = found[:, : packed.rows].contiguous()
        assert_as_exact_as_eager(found, eager(linear, x, packed, bias), oracles.linear(x, packed, bias))


def test_a_gpus_gemm_sees_aligned_extents_and_the_weight_itself(monkeypatch) -> None:
    seen = []

    def watched(x, weight, bias=None):
        seen.append((*x.shape, *weight.shape, weight.data_ptr()))
        return real(x, weight, bias)

    real = functional.linear
    monkeypatch.setattr(functional, "linear", watched)
    expected = {
        (9, 70): (3, 128, 64, 128),
        (64, 70): (3, 128, 64, 128),
        (9, 72): (3, 72, 64, 72),
        (8, 64): (3, 64, 8, 64),
    }
    for (rows, columns), extents in expected.items():
        x, packed, bias = case((3, rows, columns))
        whole_product(x, _values(packed, x.dtype), packed, bias)
        assert seen.pop() == (*extents, packed.data.data_ptr())


@pytest.mark.parametrize("rows", [9, 64])
def test_rows_that_are_padded_already_are_not_copied(rows, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(functional, "linear", lambda x, *rest: seen.append(x.data_ptr()))
    x, packed, _ = case((3, rows, 70))
    h = functional.pad(x, (0, 58))  # as gated_linear leaves it
    whole_product(h, _values(packed, x.dtype), packed, None)
    assert seen == [h.data_ptr()]


def test_a_cpus_gemm_reads_the_weight_where_it_lies(monkeypatch) -> None:
    seen = []
    real = functional.linear
    monkeypatch.setattr(
        functional, "linear", lambda x, w, b=None: seen.append((w.data_ptr(), w.shape)) or real(x, w, b)
    )
    x, packed, bias = case((3, 9, 70))
    _, up, up_bias = case((3, 9, 70), gated=True)
    with use_backend("library"):
        linear(x, packed, bias)
        gated_linear(x, up, up_bias, activation="silu")
    assert seen == [(packed.data.data_ptr(), (9, 70)), (up.data.data_ptr(), (128, 70))]  # gate and up in one product


@pytest.mark.parametrize("stored", STORED[1:], ids=str)
def test_written_out_weights_are_unpacks(stored) -> None:
    _, packed, _ = case((1, 67, 193), torch.bfloat16, *stored)
    values = _values(packed, torch.float32)
    # one rounding of a product less than unpack's: at most that of the largest one
    bound = torch.finfo(torch.float32).eps * 256 * packed.scale.float().abs().max()
    assert (values[:67, :193] - unpack(packed, dtype=torch.float32)).abs().max() <= bound
    assert not values[:, 193:].any() and values.shape[0] == 128


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cpu_writes_out_a_panel_at_a_time(monkeypatch, bits) -> None:
    x, packed, bias = case((17, 131, 127), bits=bits)
    monkeypatch.setattr(library_linear, "PANEL_ELEMENTS", 10 * 127)
    assert [(first, len(panel)) for first, panel in _panels(packed, torch.float32, 25)] == [(0, 10), (10, 10), (20, 5)]
    found = library_linear.linear(x, packed, bias)
    assert_as_exact_as_eager(found, eager(linear, x, packed, bias), oracles.linear(x, packed, bias))


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_another_dtype_than_x(dtype, x_dtype, multiplies, monkeypatch) -> None:
    monkeypatch.setattr(library_linear, "multiplies", lambda dtype: multiplies)
    x, packed, _ = case((5, 63, 65), dtype)
    x = x.to(x_dtype)
    found = library_linear.linear(x, packed, None)
    assert_as_exact_as_eager(found, eager(linear, x, packed), oracles.linear(x, packed))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_padding_stays_zero_beside_values_that_are_not_finite(value, bits) -> None:
    x, packed, bias = case((3, 9, 70), bits=bits, gated=True)
    x[1] = value
    h = library_linear.gated_linear(x, packed, bias, "silu")
    assert h.shape == (3, 64) and not h[:, 9:].any() and h[::2].isfinite().all() and not h[1, :9].isfinite().any()


CASES = Path(__file__).with_name("triton_gating_cases.py")


@pytest.mark.parametrize("options", [(), ("-p", "tests.kernels.compile_only")], ids=["interpreted", "compiled"])
def test_fused_activation(options) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(CASES)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | ({} if options else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_the_fused_activation_moves_16_bytes_at_a_time_whatever_the_width(capability) -> None:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from saap_kernels.triton_gating import BLOCK, WARPS, gating_kernel

    signature = {"both": "*bf16", "h": "*bf16", "width": "i32", "padded": "i32", "GELU": "constexpr"}
    multiples = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 3)}  # all but the width
    source = ASTSource(gating_kernel, signature | {"BLOCK": "constexpr"}, {(4,): True, (5,): BLOCK}, multiples)
    compiled = triton_compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    moved = re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"])
    assert moved == ["ld.global.v4.b32", "ld.global.v4.b32", "st.global.v4.b32"]
