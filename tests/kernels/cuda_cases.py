"""CUDA C++ kernels against float64: on the host by test_cuda_emulated.py, on a device by test_gpu.py.

The wrappers of ``saap_kernels.cuda`` are called directly, so that the same cases run in both places.
"""

import pytest
import torch

from saap_kernels import cuda, tiled_salience
from tests.kernels import edges, oracles
from tests.kernels.test_calibration_ops import SHAPES, assert_as_exact_as_eager, problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS, COUPLED = ["abs", "square", "mixed"], ["first", "second", "mixed"]
TILES = [(70, 130, 150, 1)]  # more than one tile and one warp both ways, sequences of more than one token block


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def case(tokens: int, rows: int, columns: int, dtype: torch.dtype, axis: str):
    """A problem whose units lie on ``axis``, and its bias or None."""
    if axis == "in":
        rows, columns = columns, rows
    x, dy, w, bias, spans = problem(tokens, rows, columns, dtype)
    return x, dy, w, bias if axis == "out" else None, spans


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES[:6] + TILES)
def test_weight_salience(tokens, rows, columns, unit, axis, dtype) -> None:
    x, dy, w, bias, spans = case(tokens, rows, columns, dtype, axis)
    exact = oracles.weight_salience(x, dy, w, spans, axis=axis, unit_size=unit, bias=bias, scale=0.5)
    there = None if bias is None else bias.to(DEVICE)
    got = cuda.weight_salience(*on_device(x, dy, w), spans, axis, unit, there, ORDERS, 0.5)
    assert_as_exact_as_eager(got.cpu(), exact, x, dy, w, spans, axis, unit, bias, scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES[:6] + TILES)
def test_coupled_salience(tokens, rows, columns, unit, axis, dtype) -> None:
    x, dy, w, bias, spans = case(tokens, rows, columns, dtype, axis)
    exact = oracles.coupled_salience(x, dy, w, spans, axis=axis, unit_size=unit, bias=bias)
    there = None if bias is None else bias.to(DEVICE)
    got = cuda.coupled_salience(*on_device(x, dy, w), spans, axis, unit, there, COUPLED, 1.0)
    # |mean - square / 2| cancels: fp32 rounding of a few hundred terms, relative to the largest unit
    assert ((got.cpu().double() - exact).abs() <= 2e-6 * exact.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("tokens", [1, 15, 31, 32, 33, 64, 100, 129])
def test_sequences_of_any_length_around_the_token_block(tokens) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, dy, w = (
        torch.randn(*shape, generator=generator).half() for shape in ((tokens + 9, 24), (tokens + 9, 16), (16, 24))
    )
    x[tokens], dy[tokens] = float("nan"), float("nan")
    spans = torch.tensor([[0, tokens], [tokens + 1, tokens + 9]], dtype=torch.int32)
    got = cuda.weight_salience(*on_device(x, dy, w), spans, "in", 2, None, ["abs"], 1.0)
    exact = oracles.weight_salience(x, dy, w, spans, axis="in", unit_size=2, want=("abs",))
    torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-5, atol=0)  # fp32 sums of up to 129 terms


def test_orders_are_chosen_and_placed_by_want() -> None:
    x, dy, w, _, spans = problem(17, 6, 9, torch.float16)
    arguments = (*on_device(x, dy, w), spans, "out", 1, None)
    whole = cuda.weight_salience(*arguments, ORDERS, 1.0)
    for want in (["mixed"], ["mixed", "abs"], ["square", "mixed", "abs"]):
        assert torch.equal(cuda.weight_salience(*arguments, want, 1.0), whole[[ORDERS.index(name) for name in want]])


def test_more_sequences_than_one_launch_holds_take_several(monkeypatch) -> None:
    x, dy, w, _, spans = problem(60, 33, 40, torch.float16)
    arguments = (*on_device(x, dy, w), spans, "out", 3, None, ORDERS, 1.0)
    whole = cuda.weight_salience(*arguments)
    monkeypatch.setattr(tiled_salience, "partial_bytes", lambda w: 1)
    assert torch.equal(cuda.weight_salience(*arguments), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("tokens", "features"), [(5, 1), (60, 16), (300, 136), (300, 130), (4200, 7)])
def test_activation_sums(tokens, features, aligned, dtype) -> None:
    x, _, _, _, spans = problem(tokens, 1, features, dtype)
    dx = problem(tokens, 1, features, dtype, seed=1)[0]
    shift = torch.linspace(-1, 1, features)
    there = [tensor.contiguous() for tensor in on_device(x, dx)] if aligned else on_device(x, dx)
    want = ["sum", "square", "absmax", "abs"]
    planes = cuda.sums(*there, spans, shift.to(DEVICE), want)
    assert torch.equal(cuda.sums(*there, spans, None, []), planes[:1])
    assert torch.equal(cuda.sums(there[0], None, spans, shift.to(DEVICE), ["absmax", "sum"]), planes[[3, 1]])
    for index, (start, stop) in enumerate(spans.tolist()):
        rows, moved = x[start:stop].double(), x[start:stop].double() - shift.double()
        terms = rows * dx[start:stop].double()
        rounding = 2**-24 * (len(rows) + 2)  # per term: one of its own, one per addition
        got = planes[:, index].cpu().double()
        assert ((got[0] - terms.sum(0)).abs() <= terms.abs().sum(0) * rounding).all()
        assert ((got[1] - moved.sum(0)).abs() <= moved.abs().sum(0) * rounding + 1e-6).all()
        assert ((got[2] - moved.square().sum(0)).abs() <= moved.square().sum(0) * 3 * rounding).all()
        assert torch.equal(got[3], rows.abs().amax(0))
        assert ((got[4] - rows.abs().sum(0)).abs() <= rows.abs().sum(0) * rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shift_may_have_any_stride_and_dtype(dtype) -> None:
    x, _, _, _, spans = problem(60, 1, 12, torch.float16)
    wide = torch.randn(12, 3, dtype=dtype, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    there = on_device(x)[0]
    got = cuda.sums(there, None, spans, wide[:, 1], ["sum", "square"])
    assert torch.equal(got, cuda.sums(there, None, spans, wide[:, 1].float().contiguous(), ["sum", "square"]))


def run(op: str, x, dy, *others, axis: str = "out", unit_size: int = 1) -> torch.Tensor:
    """An op by its name, as ``edges`` asks for it."""
    if op == "activation_salience":
        return cuda.sums(*on_device(x, dy), others[0], None, [])[0].cpu()
    if op == "activation_statistics":
        return cuda.sums(*on_device(x), None, dy, None, ["sum", "square", "absmax", "abs"]).cpu()
    want = ORDERS if op == "weight_salience" else COUPLED
    return getattr(cuda, op)(*on_device(x, dy, others[0]), others[1], axis, unit_size, None, want, 1.0).cpu()


@pytest.mark.parametrize("edge", edges.EDGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_edges(edge, dtype) -> None:
    edge(run, dtype, DEVICE)
