"""Ops and calibration where models live: run by test_gpu.py on a device, by test_device_cases.py on the CPU.

On the CPU the definition stands in for the GPU's backends, so that what a case does is known to work before a
device is at hand.
"""

import pytest
import torch

import saap
import saap_kernels as K
from saap.units import MODULES
from tests.kernels import oracles
from tests.kernels.test_calibration_ops import problem
from tests.saap.test_calibrate import assert_same
from tests.saap.tiny import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "cuda") if DEVICE == "cuda" else ("reference",)
SHAPES = [(5, 1, 1), (60, 7, 7), (300, 520, 4), (300, 1407, 1), (1000, 4096, 128)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def on_device(tensor: torch.Tensor, padded: bool = False) -> torch.Tensor:
    """A copy on the device: contiguous, or a view of wider rows whose padding is NaN."""
    if not padded:
        return tensor.contiguous().to(DEVICE)
    storage = torch.full((tensor.shape[0], tensor.shape[1] + 9), float("nan"), dtype=tensor.dtype, device=DEVICE)
    view = storage[:, : tensor.shape[1]]
    view.copy_(tensor)
    return view


def token_ids(sequences: int, length: int) -> torch.Tensor:
    return torch.randint(0, 64, (sequences, length), generator=torch.Generator().manual_seed(0))


def assert_close(got: saap.Statistics, wanted: saap.Statistics, share: float) -> None:
    """Means differ by at most ``share`` of the largest unit's."""
    for name in MODULES:
        for field in ("vector_mean", "element_mean"):
            left, right = (getattr(found.modules[name].salience, field) for found in (got, wanted))
            assert ((left - right).abs() <= share * right.abs().amax(-1, keepdim=True)).all(), f"{name}.{field}"


@every_backend
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "features", "unit"), SHAPES)
def test_activation_salience_error_is_bounded_by_the_sum_of_absolute_terms(
    tokens, features, unit, dtype, padded, backend
) -> None:
    y, _, _, _, spans = problem(tokens, 1, features, dtype)
    dy = problem(tokens, 1, features, dtype, seed=1)[0]
    with K.use_backend(backend):
        got = K.activation_salience(on_device(y, padded), on_device(dy, padded), spans, unit_size=unit)
        again = K.activation_salience(on_device(y, padded), on_device(dy, padded), spans, unit_size=unit)
    assert torch.equal(got, again)
    for index, (start, stop) in enumerate(spans.tolist()):
        terms = (y[start:stop].double() * dy[start:stop].double()).unflatten(1, (-1, unit)).movedim(1, 0).flatten(1)
        bound = terms.abs().sum(1) * terms.shape[1] * 2**-24  # one fp32 rounding per term at most
        assert ((got[index].cpu().double() - terms.sum(1)).abs() <= bound).all()


@every_backend
@pytest.mark.parametrize("axis", ["out", "in"])
def test_weight_salience_matches_float64(axis: str, backend: str) -> None:
    x, dy, w, _, spans = problem(60, 96, 32, torch.float32)
    exact = oracles.weight_salience(x, dy, w, spans, axis=axis, unit_size=8)
    with K.use_backend(backend):
        got = K.weight_salience(*map(on_device, (x, dy, w)), spans, axis=axis, unit_size=8).cpu().double()
    # fp32 products of 20 terms, unless TF32 is on: 2^-11 relative would fail this
    assert ((got - exact).abs() <= 1e-5 * exact.abs().amax(-1, keepdim=True)).all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_together_are_those_of_each_axis(dtype, backend: str) -> None:
    x, dy, w, _, spans = problem(60, 33, 40, dtype)
    there = [on_device(tensor, padded=True) for tensor in (x, dy, w)]
    with K.use_backend(backend):
        both = K.weight_salience_both(*there, spans, want=("mixed", "abs"), scale=0.5)
        for got, axis in zip(both, ("out", "in"), strict=True):
            wanted = K.weight_salience(*there, spans, axis=axis, want=("mixed", "abs"), scale=0.5)
            assert torch.equal(got, wanted)


@every_backend
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_calibration_equals_the_cpu_and_plans_the_same(family: str, backend: str) -> None:
    options = {"data": token_ids(4, 16), "samples": 4, "seq_len": 16}
    cpu = saap.calibrate(tiny_model(family, torch.float32), **options, backend="reference")
    found = saap.calibrate(tiny_model(family, torch.float32).to(DEVICE), **options, backend=backend)
    assert_close(found, cpu, 1e-3)  # fp32 on both, other orders of summation
    plans = [saap.search(saap.score(statistics), 0.05, multiple=8).layers for statistics in (cpu, found)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pruning_with_compensation_gives_the_model_that_a_cpu_makes(family: str) -> None:
    options = {"data": token_ids(4, 24), "samples": 4, "seq_len": 24, "ratio": 0.2, "multiple": 8}
    made = [
        saap.prune(tiny_model(family, torch.float32).to(device), **options, compensate="least_squares")
        for device in ("cpu", DEVICE)
    ]
    assert made[0].plan.layers == made[1].plan.layers
    ids = token_ids(2, 24)
    with torch.no_grad():
        wanted, got = made[0].model(ids).logits, made[1].model(ids.to(DEVICE)).logits.cpu()
    # fp32 Gram matrices of a hundred tokens, damped, and products that round in another order
    assert (got - wanted).norm() <= 1e-2 * wanted.norm()


@every_backend
def test_collect_in_a_loop_of_ones_own_gives_what_calibration_gives(backend: str) -> None:
    model, ids = tiny_model("llama", torch.float32).to(DEVICE).train(), token_ids(4, 16).to(DEVICE)
    with saap.collect(model, loss_scale=1 / 2, backend=backend) as collected:
        for part in ids.split(2):
            model(input_ids=part, labels=part).loss.backward()
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    options = {"data": ids, "samples": 4, "seq_len": 16, "batch_size": 2, "backend": backend}
    assert_close(collected.statistics, saap.calibrate(model, **options), 1e-4)  # losses rounded otherwise, in fp32


def test_token_ids_may_lie_on_the_device() -> None:
    model, ids = tiny_model("llama", torch.float32).to(DEVICE), token_ids(3, 12)
    options = {"samples": 3, "seq_len": 12}
    assert_same(saap.calibrate(model, data=ids.to(DEVICE), **options), saap.calibrate(model, data=ids, **options), 0)


def test_streamed_calibration_brings_blocks_to_the_device_and_takes_them_back() -> None:
    model = tiny_model("llama", torch.float32)
    options = {"data": token_ids(7, 12), "samples": 7, "seq_len": 12, "batch_size": 3}
    before = {name: (p.data_ptr(), p.device) for name, p in model.named_parameters()}
    streamed = saap.calibrate(model, **options, stream=True)
    assert {name: (p.data_ptr(), p.device) for name, p in model.named_parameters()} == before
    resident = saap.calibrate(model.to(DEVICE), **options, checkpoint=True, stream=False)
    assert_same(streamed, resident, rtol=0)  # the same operations in the same order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrating_twice_is_bitwise_equal(dtype) -> None:
    model = tiny_model("llama", dtype, head_dim=16, max_position_embeddings=512).to(DEVICE)
    ids = token_ids(4, 512)  # several blocks of keys, whose gradients attention may add in any order
    first, second = (saap.calibrate(model, data=ids, samples=4, seq_len=512) for _ in range(2))
    assert_same(first, second, rtol=0)
