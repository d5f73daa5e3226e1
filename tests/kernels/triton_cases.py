"""Triton kernels against float64: run by test_triton.py in Triton's interpreter, by test_gpu.py on a device.

The interpreter computes bf16 wrongly without saying so, hence fp16 and fp32 only there.
"""

import pytest
import torch
from triton.runtime.errors import OutOfResources

import saap_kernels as K
from saap_kernels import tiled_salience, triton_weight_salience
from saap_kernels.calibration import STATISTICS
from saap_kernels.triton_weight_salience import TileConfig
from tests.kernels import edges, oracles
from tests.kernels.test_calibration_ops import SHAPES, assert_as_exact_as_eager, problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
POINTERS, DESCRIPTORS = TileConfig(16, 32, 16, 4, 2), TileConfig(16, 32, 16, 4, 2, descriptors=True)
LONG_TAILS = TileConfig(16, 32, 64, 4, 2, descriptors=True)  # a tail takes up to four steps
CONFIGS = {"pointers": POINTERS, "descriptors": DESCRIPTORS, "long_tails": LONG_TAILS, "frozen": None}
ORDERS = ["abs", "square", "mixed"]


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES[:6])
def test_weight_salience(tokens, rows, columns, unit, axis, dtype, config) -> None:
    if axis == "in":
        rows, columns = columns, rows
    x, dy, w, bias, spans = problem(tokens, rows, columns, dtype)
    bias = bias if axis == "out" else None
    exact = oracles.weight_salience(x, dy, w, spans, axis=axis, unit_size=unit, bias=bias, scale=0.5)
    moved = on_device(x, dy, w)
    there = None if bias is None else bias.to(DEVICE)
    got = triton_weight_salience.weight_salience(*moved, spans, axis, unit, there, ORDERS, 0.5, CONFIGS[config])
    assert_as_exact_as_eager(got.cpu(), exact, x, dy, w, spans, axis, unit, bias, scale=0.5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES[:6])
def test_coupled_salience(tokens, rows, columns, unit, axis, dtype, config) -> None:
    if axis == "in":
        rows, columns = columns, rows
    x, dy, w, bias, spans = problem(tokens, rows, columns, dtype)
    bias = bias if axis == "out" else None
    exact = oracles.coupled_salience(x, dy, w, spans, axis=axis, unit_size=unit, bias=bias)
    names = ["first", "second", "mixed"]
    there = None if bias is None else bias.to(DEVICE)
    got = triton_weight_salience.coupled_salience(
        *on_device(x, dy, w), spans, axis, unit, there, names, 1.0, CONFIGS[config]
    )
    # |mean - square / 2| cancels: fp32 rounding of a few hundred terms, relative to the largest unit
    assert ((got.cpu().double() - exact).abs() <= 2e-6 * exact.abs().amax(-1, keepdim=True)).all()


def test_more_sequences_than_one_launch_holds_take_several(monkeypatch) -> None:
    x, dy, w, bias, spans = problem(60, 33, 40, torch.float32)
    whole = triton_weight_salience.weight_salience(*on_device(x, dy, w), spans, "out", 3, None, ORDERS, 1.0)
    monkeypatch.setattr(tiled_salience, "partial_bytes", lambda w: 1)
    parts = triton_weight_salience.weight_salience(*on_device(x, dy, w), spans, "out", 3, None, ORDERS, 1.0)
    assert torch.equal(whole, parts)


def test_a_span_as_long_as_whole_blocks_reads_nothing_behind_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy, w = (torch.randn(*shape, generator=generator) for shape in ((48, 24), (48, 16), (16, 24)))
    spans = torch.tensor([[0, 16], [16, 47]], dtype=torch.int32)
    x[47] = float("nan")
    for config in (POINTERS, DESCRIPTORS):
        got = triton_weight_salience.weight_salience(*on_device(x, dy, w), spans, "in", 2, None, ["abs"], 1.0, config)
        exact = oracles.weight_salience(x, dy, w, spans, axis="in", unit_size=2, want=("abs",))
        torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-5, atol=0)  # fp32 sums of 16 terms


@pytest.mark.parametrize("tail", [1, 15, 16, 17, 33, 48, 63])
def test_tails_take_as_many_steps_as_they_need(tail) -> None:
    generator = torch.Generator().manual_seed(tail)
    tokens = 64 + tail
    x, dy, w = (torch.randn(*shape, generator=generator) for shape in ((tokens + 9, 24), (tokens + 9, 16), (16, 24)))
    x[tokens], dy[tokens] = float("nan"), float("nan")
    spans = torch.tensor([[0, tokens], [tokens + 1, tokens + 9]], dtype=torch.int32)
    got = triton_weight_salience.weight_salience(*on_device(x, dy, w), spans, "in", 2, None, ["abs"], 1.0, LONG_TAILS)
    exact = oracles.weight_salience(x, dy, w, spans, axis="in", unit_size=2, want=("abs",))
    torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-5, atol=0)  # fp32 sums of up to 127 terms


def test_orders_are_chosen_and_placed_by_want() -> None:
    x, dy, w, _, spans = problem(17, 6, 9, torch.float32)
    arguments = (*on_device(x, dy, w), spans)
    with K.use_backend("triton"):
        whole = K.weight_salience(*arguments, axis="out")
        for want in (("mixed",), ("mixed", "abs"), ("square", "mixed", "abs")):
            rows = [ORDERS.index(name) for name in want]
            assert torch.equal(K.weight_salience(*arguments, axis="out", want=want), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features", "unit"), [(5, 1, 1), (60, 12, 4), (300, 130, 1), (4200, 7, 7)])
def test_activation_ops(tokens, features, unit, dtype) -> None:
    x, _, _, _, spans = problem(tokens, 1, features, dtype)
    dx = problem(tokens, 1, features, dtype, seed=1)[0]
    shift = torch.linspace(-1, 1, features)
    there = (*on_device(x, dx), spans)
    with K.use_backend("triton"):
        signed, sums = K.activation_salience_statistics(*there, unit_size=unit, shift=shift.to(DEVICE), want=STATISTICS)
        assert torch.equal(signed, K.activation_salience(*there, unit_size=unit))
        chosen = K.activation_statistics(there[0], spans, shift=shift.to(DEVICE), want=("absmax", "sum"))
        assert torch.equal(chosen, sums[[2, 0]])
    for index, (start, stop) in enumerate(spans.tolist()):
        rows, moved = x[start:stop].double(), x[start:stop].double() - shift.double()
        terms = (rows * dx[start:stop].double()).unflatten(1, (-1, unit)).movedim(1, 0).flatten(1)
        rounding = 2**-24 * (terms.shape[1] + 2)  # per term: one of its own, one per addition
        assert ((signed[index].cpu().double() - terms.sum(1)).abs() <= terms.abs().sum(1) * rounding).all()
        assert ((sums[0, index].cpu() - moved.sum(0)).abs() <= moved.abs().sum(0) * rounding + 1e-6).all()
        assert ((sums[1, index].cpu() - moved.square().sum(0)).abs() <= moved.square().sum(0) * 3 * rounding).all()
        assert torch.equal(sums[2, index].cpu().double(), rows.abs().amax(0))
        assert ((sums[3, index].cpu() - rows.abs().sum(0)).abs() <= rows.abs().sum(0) * rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shift_may_have_any_stride_and_dtype(dtype) -> None:
    x, _, _, _, spans = problem(60, 1, 12, torch.float32)
    wide = torch.randn(12, 3, dtype=dtype, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    there = on_device(x)[0]
    with K.use_backend("triton"):
        got = K.activation_statistics(there, spans, shift=wide[:, 1])
        assert torch.equal(got, K.activation_statistics(there, spans, shift=wide[:, 1].float().contiguous()))


def test_calibration_plans_the_same_as_the_cpu() -> None:
    from saap import calibrate, score, search
    from tests.saap.tiny import tiny_model

    ids = torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(0))
    plans = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        model = tiny_model("llama", torch.float32, num_hidden_layers=1, intermediate_size=31).to(device)
        statistics = calibrate(model, data=ids, samples=3, seq_len=8, backend=backend)
        plans.append(search(score(statistics), 0.05, multiple=1).layers)
    assert plans[0] == plans[1]


def run(op: str, *arguments, **options) -> torch.Tensor:
    """An op by its name, as ``edges`` asks for it; spans stay on the host."""
    with K.use_backend("triton"):
        return getattr(K, op)(*on_device(*arguments[:-1]), arguments[-1], **options).cpu()


@pytest.mark.parametrize("edge", edges.EDGES)
def test_edges(edge) -> None:
    edge(run, torch.float16, DEVICE)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("planted"), "planted"),
        (OutOfResources(300_000, 232_448, "shared memory"), "out of resource: shared memory, Required: 300000"),
    ],
    ids=["runtime", "resources"],
)
def test_a_failed_launch_carries_the_name_of_the_kernel(monkeypatch, error, text) -> None:
    class Failing:
        def __getitem__(self, grid):
            raise error

    x, dy, w, _, spans = problem(17, 6, 9, torch.float16)
    monkeypatch.setattr(triton_weight_salience, "weight_salience_kernel", Failing())
    with pytest.raises(RuntimeError, match=f"^weight_salience_kernel on {DEVICE}.*: {text}"):
        run("weight_salience", x, dy, w, spans, axis="out")
