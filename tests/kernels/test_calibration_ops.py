"""Every calibration op against explicit per-sequence gradients in float64."""

import pytest
import torch

import saap_kernels as K
from saap_kernels import _ext
from saap_kernels.calibration import STATISTICS
from tests.kernels import oracles

SHAPES = [
    (12, 8, 16, 4),
    (17, 6, 9, 3),
    (5, 1, 1, 1),
    (33, 96, 31, 1),
    (64, 40, 1, 8),
    (24, 1, 48, 1),
    (300, 520, 520, 4),
]


def problem(tokens: int, rows: int, columns: int, dtype=torch.float64, seed: int = 0):
    """x, dy, w, bias as views of wider storage whose padding is NaN, ragged spans with gaps that hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        storage = torch.full((shape[0], shape[1] + 3), float("nan"), dtype=dtype)
        view = storage[:, : shape[1]]
        view.copy_(torch.randn(*shape, generator=generator, dtype=torch.float64))
        return view

    x, dy, w = draw(tokens, columns), draw(tokens, rows), draw(rows, columns)
    bias = torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)
    if tokens < 8:
        spans = [(0, tokens)]
    else:
        spans = [(1, tokens // 3), (tokens // 3, tokens // 3 + 1), (tokens // 2, tokens - 1)]
        for row in (0, *range(tokens // 3 + 1, tokens // 2), tokens - 1):
            x[row], dy[row] = float("nan"), float("nan")
    return x, dy, w, bias, torch.tensor(spans, dtype=torch.int32)


def assert_as_exact_as_eager(got, exact, x, dy, w, spans, axis, unit, bias, scale=1.0) -> None:
    """|got - exact| is at most twice what eager torch in fp32 errs, all orders of weight salience."""
    eager = []
    for start, stop in spans.tolist():
        s = w.float() * (dy[start:stop].float().T @ x[start:stop].float()) * scale
        b = None if bias is None else bias.float() * dy[start:stop].float().sum(0) * scale
        functions = oracles.FUNCTIONS.values()
        eager.append(torch.stack([oracles.group(f(s), None if b is None else f(b), axis, unit) for f in functions]))
    eager_error = (torch.stack(eager, 1).double() - exact).abs().amax(-1, keepdim=True)
    assert got.dtype == torch.float32 and got.shape == exact.shape
    # all terms of the sums are positive; four more roundings, as eager may be exact by luck where there is one unit
    allowed = 2 * eager_error + 4 * 2**-23 * exact.abs().amax(-1, keepdim=True)
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES)
def test_weight_salience_is_exact_in_float64(tokens, rows, columns, unit, axis, with_bias) -> None:
    if axis == "in":
        rows, columns, with_bias = columns, rows, False
    x, dy, w, bias, spans = problem(tokens, rows, columns)
    options = {"axis": axis, "unit_size": unit, "bias": bias if with_bias else None}
    got = K.weight_salience(x, dy, w, spans, **options, scale=0.5)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, oracles.weight_salience(x, dy, w, spans, **options, scale=0.5), rtol=1e-11, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES)
def test_fp32_backends_err_no_more_than_eager_torch(tokens, rows, columns, unit, axis, backend) -> None:
    if axis == "in":
        rows, columns = columns, rows
    x, dy, w, bias, spans = problem(tokens, rows, columns, torch.float32)
    options = {"axis": axis, "unit_size": unit, "bias": bias if axis == "out" else None}
    exact = oracles.weight_salience(x, dy, w, spans, **options)
    with K.use_backend(backend):
        got = K.weight_salience(x, dy, w, spans, **options)
    assert_as_exact_as_eager(got, exact, x, dy, w, spans, axis, unit, options["bias"])


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES)
def test_coupled_salience_takes_absolute_values_after_the_mean(tokens, rows, columns, unit, axis) -> None:
    if axis == "in":
        rows, columns = columns, rows
    x, dy, w, bias, spans = problem(tokens, rows, columns)
    options = {"axis": axis, "unit_size": unit, "bias": bias if axis == "out" else None}
    got = K.coupled_salience(x, dy, w, spans, **options)
    torch.testing.assert_close(got, oracles.coupled_salience(x, dy, w, spans, **options), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES)
def test_native_coupled_salience_errs_by_fp32_rounding_only(tokens, rows, columns, unit, axis) -> None:
    if axis == "in":
        rows, columns = columns, rows
    x, dy, w, bias, spans = problem(tokens, rows, columns, torch.float32)
    options = {"axis": axis, "unit_size": unit, "bias": bias if axis == "out" else None}
    with K.use_backend("cpu"):
        got = K.coupled_salience(x, dy, w, spans, **options, want=("mixed", "first"))
    exact = oracles.coupled_salience(x, dy, w, spans, **options, want=("mixed", "first"))
    # |mean - square / 2| cancels: fp32 rounding of a few hundred terms, relative to the largest unit
    assert ((got.double() - exact).abs() <= 2e-6 * exact.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("features", [1, 7, 512, 1100])
def test_native_activation_sums_read_once_and_agree_with_float64(features: int) -> None:
    x, _, _, _, spans = problem(300, 1, features, torch.float32)
    dx = problem(300, 1, features, torch.float32, seed=1)[0]
    shift = torch.linspace(-1, 1, features)
    with K.use_backend("cpu"):
        signed, sums = K.activation_salience_statistics(x, dx, spans, shift=shift, want=STATISTICS)
        assert torch.equal(signed, K.activation_salience(x, dx, spans))
        assert torch.equal(sums[:3], K.activation_statistics(x, spans, shift=shift))
        assert torch.equal(sums[[2, 0]], K.activation_statistics(x, spans, shift=shift, want=("absmax", "sum")))
        unshifted = K.activation_statistics(x, spans, want=("sum",))[0]
    for index, (start, stop) in enumerate(spans.tolist()):
        rows, moved = x[start:stop].double(), x[start:stop].double() - shift.double()
        terms = rows * dx[start:stop].double()
        # each term is rounded once and added in fp32 within blocks of 64 rows
        rounding = 66 * 2**-24
        assert ((signed[index] - terms.sum(0)).abs() <= terms.abs().sum(0) * rounding).all()
        assert ((sums[0, index] - moved.sum(0)).abs() <= moved.abs().sum(0) * rounding + 1e-6).all()
        assert ((sums[1, index] - moved.square().sum(0)).abs() <= moved.square().sum(0) * 2 * rounding).all()
        assert torch.equal(sums[2, index].double(), rows.abs().amax(0))
        assert ((sums[3, index] - rows.abs().sum(0)).abs() <= rows.abs().sum(0) * rounding).all()
        assert ((unshifted[index] - rows.sum(0)).abs() <= rows.abs().sum(0) * rounding).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_orders_are_chosen_and_placed_by_want(backend: str) -> None:
    x, dy, w, _, spans = problem(17, 6, 9, torch.float32)
    with K.use_backend(backend):
        whole = K.weight_salience(x, dy, w, spans, axis="out")
        for want in (("mixed",), ("mixed", "abs"), ("square", "mixed", "abs")):
            rows = [("abs", "square", "mixed").index(name) for name in want]
            assert torch.equal(K.weight_salience(x, dy, w, spans, axis="out", want=want), whole[rows])


def test_signed_sums_follow_from_activations_alone() -> None:
    x, _, w, bias, _ = problem(5, 6, 9)
    dy = torch.randn(5, 6, dtype=torch.float64)
    spans = torch.tensor([[0, 2], [2, 5]], dtype=torch.int32)
    rows = K.activation_salience(x @ w.T + bias, dy, spans, unit_size=3)
    columns = K.activation_salience(x, dy @ w, spans, unit_size=3)
    for index, (s, b) in enumerate(oracles.saliences(x, dy, w, spans, bias)):
        torch.testing.assert_close(rows[index], oracles.group(s, b, "out", 3), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(columns[index], oracles.group(s, None, "in", 3), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_activation_salience_error_is_bounded_by_the_sum_of_absolute_terms(dtype: torch.dtype) -> None:
    x, dy, _, _, spans = problem(60, 12, 12, dtype)
    got = K.activation_salience(x, dy, spans, unit_size=4)
    for index, (start, stop) in enumerate(spans.tolist()):
        terms = (x[start:stop].double() * dy[start:stop].double()).unflatten(1, (3, 4)).movedim(1, 0).flatten(1)
        # inputs are exact; products and sums round in fp32, at most once per term
        bound = terms.abs().sum(1) * terms.shape[1] * 2**-24
        assert got.dtype == torch.float32
        assert ((got[index].double() - terms.sum(1)).abs() <= bound).all()


def test_activation_statistics_sum_about_the_shift() -> None:
    x, _, _, _, spans = problem(60, 1, 7)
    shift = torch.randn(7, dtype=torch.float64)
    total, square, largest, absolute = K.activation_statistics(x, spans, shift=shift, want=STATISTICS)
    for index, (start, stop) in enumerate(spans.tolist()):
        rows = x[start:stop]
        torch.testing.assert_close(total[index], (rows - shift).sum(0))
        torch.testing.assert_close(square[index], (rows - shift).square().sum(0))
        torch.testing.assert_close(largest[index], rows.abs().amax(0))
        torch.testing.assert_close(absolute[index], rows.abs().sum(0))
    both = K.activation_salience_statistics(x, x, spans, shift=shift, want=("square",))
    assert torch.equal(both[0], K.activation_salience(x, x, spans)) and torch.equal(both[1][0], square)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_shift_may_have_any_stride_and_dtype(backend: str, dtype: torch.dtype) -> None:
    x, _, _, _, spans = problem(60, 1, 12, torch.float32)
    wide = torch.randn(12, 3, dtype=dtype, generator=torch.Generator().manual_seed(2))
    with K.use_backend(backend):
        got = K.activation_statistics(x, spans, shift=wide[:, 1])
        assert torch.equal(got, K.activation_statistics(x, spans, shift=wide[:, 1].float().contiguous()))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ranking_agrees_with_float64_outside_ties(backend: str) -> None:
    x, dy, w, _, spans = problem(300, 520, 130, torch.float32)
    exact = oracles.weight_salience(x, dy, w, spans, axis="out", want=("abs",))[0].mean(0)
    with K.use_backend(backend):
        got = K.weight_salience(x, dy, w, spans, axis="out", want=("abs",))[0].double().mean(0)
    for keep in (100, 260, 400):
        cut = exact.sort().values[keep]
        clear = (exact - cut).abs() > 1e-5 * cut  # fp32 sums of thousands of terms
        assert torch.equal((exact < cut)[clear], (got < got.sort().values[keep])[clear])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_results_are_bitwise_reproducible_whatever_the_threads(backend: str) -> None:
    x, dy, w, _, spans = problem(64, 40, 50, torch.float32)
    threads = torch.get_num_threads()
    try:
        with K.use_backend(backend):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for axis in ("in", "out"):
                    results.append(K.weight_salience(x, dy, w, spans, axis=axis, unit_size=5))
                results.append(K.coupled_salience(x, dy, w, spans, axis="in", unit_size=5))
                results.append(K.activation_statistics(x, spans))
        for index, result in enumerate(results[4:]):
            assert torch.equal(result, results[index % 4])
    finally:
        torch.set_num_threads(threads)


def test_sequences_may_come_in_one_call_or_many() -> None:
    x, dy, w, _, spans = problem(60, 6, 9)
    whole = K.weight_salience(x, dy, w, spans, axis="out")
    parts = [K.weight_salience(x, dy, w, span[None], axis="out") for span in spans]
    torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)])
@pytest.mark.parametrize(("tokens", "rows", "columns", "unit"), SHAPES)
def test_both_axes_at_once_are_the_axes_one_by_one(tokens, rows, columns, unit, backend, dtype) -> None:
    x, dy, w, _, spans = problem(tokens, rows, columns, dtype)
    with K.use_backend(backend):
        found = K.weight_salience_both(x, dy, w, spans, want=("mixed", "abs"), scale=0.5)
        for axis, got in zip(("out", "in"), found, strict=True):
            assert torch.equal(got, K.weight_salience(x, dy, w, spans, axis=axis, want=("mixed", "abs"), scale=0.5))


def test_both_axes_at_once_check_their_arguments() -> None:
    x, dy, w, _, spans = problem(12, 8, 16)
    with pytest.raises(ValueError, match="w: expected 8 in dimension 0, got shape"):
        K.weight_salience_both(x, dy, w[:7], spans)
    with pytest.raises(ValueError, match="want: expected distinct names among abs, square, mixed, got"):
        K.weight_salience_both(x, dy, w, spans, want=("first",))


def test_ops_pass_opcheck_and_compile_without_graph_breaks() -> None:
    x, dy, w, bias, spans = (t.contiguous() for t in problem(5, 6, 9, torch.float32))
    arguments = (x, dy, w, spans, "out", 2, bias, ["abs", "mixed"], 1.0)
    torch.library.opcheck(torch.ops.saap.weight_salience.default, arguments)
    torch.library.opcheck(torch.ops.saap.weight_salience_both.default, (*arguments[:4], ["abs", "mixed"], 1.0))
    torch.library.opcheck(torch.ops.saap.coupled_salience.default, (*arguments[:7], ["first"], 1.0))
    torch.library.opcheck(torch.ops.saap.activation_salience.default, (x, x, spans, 3))
    torch.library.opcheck(torch.ops.saap.activation_statistics.default, (x, spans, None, ["sum"]))
    pair = (x, x.clone(), spans, 3, x[0].clone(), ["absmax", "sum"])
    torch.library.opcheck(torch.ops.saap.activation_salience_statistics.default, pair)
    compiled = torch.compile(
        lambda a, b: torch.ops.saap.weight_salience(a, b, *arguments[2:]) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, dy), torch.ops.saap.weight_salience(*arguments) * 2)


def test_the_native_module_is_built_here() -> None:
    assert _ext.native() is not None, _ext.why_no_native()  # the CPU tests above would otherwise test nothing
