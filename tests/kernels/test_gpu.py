"""Ops and calibration on a CUDA device, against float64 and against the CPU."""

import pytest
import torch

import saap
import saap_kernels as K
from saap_kernels import _ext
from tests.kernels import oracles
from tests.kernels.test_calibration_ops import problem
from tests.kernels.triton_cases import (  # noqa: F401  the same cases, on the device and with bf16
    test_a_span_as_long_as_whole_blocks_reads_nothing_behind_it,
    test_activation_ops,
    test_calibration_plans_the_same_as_the_cpu,
    test_coupled_salience,
    test_edges,
    test_more_sequences_than_one_launch_holds_take_several,
    test_orders_are_chosen_and_placed_by_want,
    test_weight_salience,
)
from tests.saap.test_calibrate import assert_same
from tests.saap.tiny import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHAPES = [(5, 1, 1), (60, 7, 7), (300, 520, 4), (300, 1407, 1), (1000, 4096, 128)]


def on_device(tensor: torch.Tensor, padded: bool) -> torch.Tensor:
    """A copy on the device: contiguous, or a view of wider rows whose padding is NaN."""
    if not padded:
        return tensor.contiguous().cuda()
    storage = torch.full((tensor.shape[0], tensor.shape[1] + 9), float("nan"), dtype=tensor.dtype, device="cuda")
    view = storage[:, : tensor.shape[1]]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "features", "unit"), SHAPES)
def test_activation_salience_error_is_bounded_by_the_sum_of_absolute_terms(
    tokens, features, unit, dtype, padded
) -> None:
    y, _, _, _, spans = problem(tokens, 1, features, dtype)
    dy = problem(tokens, 1, features, dtype, seed=1)[0]
    assert _ext.cuda_status() == (True, "ok")
    with K.use_backend("cuda"):
        got = K.activation_salience(on_device(y, padded), on_device(dy, padded), spans, unit_size=unit)
        again = K.activation_salience(on_device(y, padded), on_device(dy, padded), spans, unit_size=unit)
    assert torch.equal(got, again)
    for index, (start, stop) in enumerate(spans.tolist()):
        terms = (y[start:stop].double() * dy[start:stop].double()).unflatten(1, (-1, unit)).movedim(1, 0).flatten(1)
        bound = terms.abs().sum(1) * terms.shape[1] * 2**-24  # one fp32 rounding per term at most
        assert ((got[index].cpu().double() - terms.sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("axis", ["out", "in"])
def test_weight_salience_on_the_device_matches_float64(axis: str) -> None:
    x, dy, w, _, spans = problem(60, 96, 32, torch.float32)
    exact = oracles.weight_salience(x, dy, w, spans, axis=axis, unit_size=8)
    got = K.weight_salience(x.cuda(), dy.cuda(), w.cuda(), spans, axis=axis, unit_size=8).cpu().double()
    # fp32 products of 20 terms, unless TF32 is on: 2^-11 relative would fail this
    assert ((got - exact).abs() <= 1e-5 * exact.abs().amax(-1, keepdim=True)).all()


def test_calibration_on_the_device_equals_the_cpu() -> None:
    from saap import calibrate
    from tests.saap.tiny import tiny_model

    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    options = {"data": ids, "samples": 4, "seq_len": 16}
    cpu = calibrate(tiny_model("llama", torch.float32), **options)
    gpu = calibrate(tiny_model("llama", torch.float32).cuda(), **options)
    for name in ("attention", "mlp"):
        for field in ("vector_mean", "element_mean"):
            want = getattr(cpu.modules[name].salience, field)
            got = getattr(gpu.modules[name].salience, field)
            assert ((got - want).abs() <= 1e-3 * want.abs().amax(-1, keepdim=True)).all()  # fp32 on both, other orders


def test_streamed_calibration_brings_blocks_to_the_device_and_takes_them_back() -> None:
    model = tiny_model("llama", torch.float32)
    ids = torch.randint(0, 64, (7, 12), generator=torch.Generator().manual_seed(0))
    options = {"data": ids, "samples": 7, "seq_len": 12, "batch_size": 3}
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    streamed = saap.calibrate(model, **options, stream=True)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    resident = saap.calibrate(model.cuda(), **options, checkpoint=True, stream=False)
    assert_same(streamed, resident, rtol=1e-5)  # atomics in the attention backward may order sums otherwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrating_twice_on_the_device_is_bitwise_equal(dtype) -> None:
    model = tiny_model("llama", dtype, head_dim=16, max_position_embeddings=512).cuda()
    ids = torch.randint(0, 64, (4, 512), generator=torch.Generator().manual_seed(0))  # several blocks of keys
    first, second = (saap.calibrate(model, data=ids, samples=4, seq_len=512) for _ in range(2))
    assert_same(first, second, rtol=0)
