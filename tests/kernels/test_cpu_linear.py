"""The CPU backend of the inference ops beyond what every backend is tested for: its paths, threads and sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from saap_kernels import PackedWeight, _ext, cpu_linear, gated_linear, linear, pack, use_backend
from saap_kernels.packed import round_up
from tests.kernels import linear_oracles as oracles
from tests.kernels.test_inference_ops import case, eager

STORED = [(16, None), (8, None), (4, None), (8, 96), (4, 32), (4, 96)]  # also groups that end within a block of 64
SHAPES = [(1, 131, 513), (3, 131, 65), (8, 70, 1100)]  # (T, N, K): one token, and more of them; more than one tile


@contextmanager
def running(tokens: int, portable: bool) -> Iterator[None]:
    """The backend, up to ``tokens`` by the kernel, more in panels of 64 rows; the code for any processor or AVX2's."""
    native = _ext.native()
    names = ("packed_linear_f32", "unpack_rows_f32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear, "KERNEL_TOKENS", tokens)
        patch.setattr(cpu_linear, "PANEL_ELEMENTS", 1)
        if portable:
            code = SimpleNamespace(**{name: partial(getattr(native, name), portable=True) for name in names})
            patch.setattr(cpu_linear, "_native", lambda: code)
        with use_backend("cpu"):  # unasked, fp32 weights are torch's
            yield


PATHS = [(128, False), (128, True), (0, False), (0, True)]


def assert_exact(x, packed, bias, gated: bool) -> None:
    if not gated:
        found, expected = linear(x, packed, bias), eager(linear, x, packed, bias)
        oracles.assert_as_exact_as_eager(found, expected, oracles.linear(x, packed, bias))
        return
    found = gated_linear(x, packed, bias, activation="silu")
    expected = eager(gated_linear, x, packed, bias, activation="silu")
    oracles.assert_as_exact_as_eager(found, expected, oracles.gated_linear(x, packed, bias, activation="silu"))
    pitch = round_up(packed.rows, 64)
    assert not found.as_strided((len(x), pitch), (pitch, 1))[:, packed.rows :].any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_panels_and_portable_code_are_as_exact(shape, stored, dtype, gated) -> None:
    arguments = (*case(shape, dtype, *stored, gated=gated), gated)
    for path in PATHS:
        with running(*path):
            assert_exact(*arguments)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_and_scales_of_another_dtype_than_x(dtype, stored) -> None:
    for bits in (16, 8):
        x, packed, _ = case((3, 70, 130), stored, bits)
        x = x.to(dtype)
        exact = oracles.linear(x, packed)
        for path in PATHS:
            with running(*path):
                found = linear(x, packed)
            # fp32 sums of about 130 terms, then one rounding to the dtype of x
            torch.testing.assert_close(
                found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5 * float(exact.abs().max())
            )


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_results_do_not_depend_on_the_number_of_threads(bits) -> None:
    before = torch.get_num_threads()
    found = []
    for tokens in (1, 5):
        x, packed, bias = case((tokens, 300, 1100), bits=bits)  # enough elements for a team
        _, up, _ = case((tokens, 300, 1100), bits=bits, gated=True)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpu"):  # unasked, fp32 weights are torch's
                found.append((linear(x, packed, bias), gated_linear(x, up, activation="gelu_tanh")))
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        found.clear()


@pytest.mark.parametrize("bits", [8, 4])
def test_large_x_overflows_only_where_torch_does(bits) -> None:
    x, packed, _ = case((1, 9, 70), bits=bits)
    x *= 1e37  # Q * x overflows, W * x does not
    found = linear(x, packed)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), oracles.linear(x, packed), rtol=1e-4, atol=1e32)  # 1e-5 of the largest


def test_infinity_in_a_column_whose_quantised_weight_is_zero() -> None:
    packed = pack(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), bits=4)
    assert (packed.data[0, 0] & 15) == 0
    x = torch.tensor([[torch.inf, 1.0, 1.0, 1.0]])
    assert linear(x, packed).tolist() == [[torch.inf]]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_memory_beyond_the_columns_of_x_is_not_read(bits) -> None:
    x, packed, _ = case((3, 9, 70), torch.bfloat16, bits)
    for dtype, path in product((torch.float32, torch.bfloat16), PATHS):
        wide = torch.full((3, 128), torch.nan, dtype=dtype)
        wide[:, :70] = x
        with running(*path):
            assert torch.equal(linear(wide[:, :70], packed), linear(x.to(dtype), packed))


def test_tensors_of_64_bits_run_in_torch() -> None:
    x, packed, bias = case((3, 9, 70), bits=8)
    assert torch.equal(linear(x.double(), packed, bias.double()), eager(linear, x.double(), packed, bias.double()))
    wide = replace(packed, scale=packed.scale.double(), zero=packed.zero.double())
    with use_backend("cpu"), pytest.raises(ValueError, match="takes fp16, bf16 or fp32 tensors on the CPU"):
        linear(x.double(), packed, bias.double())
    with use_backend("cpu"):  # the library's product in fp32, in another order
        torch.testing.assert_close(linear(x, wide, bias), eager(linear, x, wide, bias), rtol=1e-5, atol=1e-5)


def test_more_than_2_to_the_31_weights() -> None:
    rows, columns = 1 << 16, (1 << 15) + 128  # 2 GiB of int8 zeros that are only read: the system need not keep them
    data = torch.zeros(rows, columns, dtype=torch.int8)
    row = torch.randint(-128, 128, (columns,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    data[-1] = row
    scale, zero = torch.ones(rows, 1), torch.full((rows, 1), 0.5)
    packed = PackedWeight(data, (rows, columns), 8, columns, scale, zero)
    last = PackedWeight(row.expand(64, -1).contiguous(), (64, columns), 8, columns, scale[:64], zero[:64])
    assert rows * columns > 1 << 31
    for tokens in (1, 2):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
        assert torch.equal(linear(x, packed)[:, -1], linear(x, last)[:, -1])
