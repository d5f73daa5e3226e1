"""``linear``, ``gated_linear`` and ``gated_mlp`` on every backend that runs here against float64; edges, bad input."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saap_kernels import (
    available_backends,
    cpu_linear,
    gated_linear,
    gated_mlp,
    library_linear,
    linear,
    pack,
    products,
    unpack,
    use_backend,
)
from saap_kernels.backend import INFERENCE
from saap_kernels.products import IMPLEMENTED
from tests.kernels import linear_oracles as oracles
from tests.kernels.linear_oracles import SHAPES, assert_as_exact_as_eager

STATUS = available_backends()
HERE = [name for name in IMPLEMENTED if STATUS[name] == "ok" and INFERENCE[name][0](torch.ones(1))]  # CPU tensors
BACKENDS = [None, *HERE]  # None: what is chosen unasked
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORED = list(product((16, 8, 4), (None,))) + [(8, 32), (4, 64)]


def case(shape, dtype=torch.float32, bits=16, group=None, gated=False, bias=True):
    """x, packed weight and bias of one product."""
    tokens, rows, columns = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    lead = (2,) if gated else ()
    packed = pack(random(*lead, rows, columns) / columns**0.5, bits=bits, group_size=group)
    return random(tokens, columns), packed, random(*lead, rows) if bias else None


def eager(op, x, packed, *rest, **options):
    with use_backend("reference"):
        return op(x, packed, *rest, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, dtype, stored, backend):
    x, packed, bias = case(shape, dtype, *stored)
    with use_backend(backend):
        found = linear(x, packed, bias)
    assert found.is_contiguous()
    assert_as_exact_as_eager(found, eager(linear, x, packed, bias), oracles.linear(x, packed, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_linear(shape, dtype, stored, activation, backend):
    x, packed, bias = case(shape, dtype, *stored, gated=True, bias=activation == "silu")
    with use_backend(backend):
        found = gated_linear(x, packed, bias, activation=activation)
    exact = oracles.gated_linear(x, packed, bias, activation=activation)
    assert_as_exact_as_eager(found, eager(gated_linear, x, packed, bias, activation=activation), exact)
    pitch = -(-shape[1] // 64) * 64
    assert found.stride() == (pitch, 1)
    assert not found.as_strided((shape[0], pitch), (pitch, 1))[:, shape[1] :].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (4, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_mlp(shape, dtype, bits, backend):
    tokens, width, features = shape
    x, up, up_bias = case(shape, dtype, bits[0], gated=True)
    _, down, down_bias = case((tokens, features, width), dtype, bits[1])
    arguments = (x, up, down, up_bias, down_bias)
    with use_backend(backend):
        found = gated_mlp(*arguments, activation="silu")
    assert found.is_contiguous()
    exact = oracles.gated_mlp(*arguments, activation="silu")
    assert_as_exact_as_eager(found, eager(gated_mlp, *arguments, activation="silu"), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_shapes_of_x(bits, backend):
    x, packed, bias = case((12, 7, 65), bits=bits)
    _, up, _ = case((12, 7, 65), bits=bits, gated=True)
    wide = torch.full((12, 100), torch.nan)
    wide[:, :65] = x
    with use_backend(backend):
        whole, gated = linear(x, packed, bias), gated_linear(x, up, activation="silu")
        for given in (x.view(3, 4, 65), wide[:, :65], x.T.contiguous().T):  # leading dimensions, a pitch, columns
            # other pitches and copies may be summed by another routine of torch
            torch.testing.assert_close(linear(given, packed, bias).view(12, 7), whole, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                gated_linear(given, up, activation="silu").reshape(12, 7), gated, rtol=1e-5, atol=1e-5
            )
        assert linear(x[0], packed, bias).shape == (7,) and gated_linear(x[0], up, activation="silu").shape == (7,)
        for empty in (x[:0], x[:0].view(0, 3, 65)):
            assert linear(empty, packed, bias).shape == (*empty.shape[:-1], 7)
            assert gated_linear(empty, up, activation="silu").shape == (*empty.shape[:-1], 7)
            assert gated_mlp(empty, up, pack(torch.ones(5, 7)), activation="silu").shape == (*empty.shape[:-1], 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_values_that_are_not_finite_stay_in_their_row(value, bits, tokens, backend):
    x, packed, _ = case((tokens, 9, 70), bits=bits)
    x[-1, 3] = value
    with use_backend(backend):
        found = linear(x, packed)
    expected = eager(linear, x, packed)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    assert found[:-1].isfinite().all() and not found[-1].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_gated_values_that_are_not_finite_are_torchs_and_the_padding_is_zero(value, bits, tokens, activation, backend):
    x, up, up_bias = case((tokens, 9, 70), bits=bits, gated=True)
    _, down, down_bias = case((tokens, 5, 9), bits=bits)
    x[-1, 3] = value
    expected = eager(gated_linear, x, up, up_bias, activation=activation)
    with use_backend(backend):
        found = gated_linear(x, up, up_bias, activation=activation)
        mlp = gated_mlp(x, up, down, up_bias, down_bias, activation=activation)
    for ours, theirs in ((found, expected), (mlp, eager(linear, expected, down, down_bias))):
        assert torch.equal(ours.isnan(), theirs.isnan()) and ours[:-1].isfinite().all()
        # a routine that adds in another order meets the same infinities
        assert torch.equal(ours.isposinf(), theirs.isposinf()) and torch.equal(ours.isneginf(), theirs.isneginf())
    assert not found.as_strided((tokens, 64), (64, 1))[:, 9:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [16, 8])
def test_inference_tensors_and_frozen_weights(bits, backend):
    with torch.inference_mode(), use_backend(backend):
        x, packed, bias = case((3, 9, 70), bits=bits)
        inside = linear(x, packed, bias)
        assert inside.is_inference()
    with use_backend(backend):
        assert torch.equal(linear(x, packed, bias), inside)  # where no gradient is wanted
        leaf = x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            linear(leaf, packed, bias)  # as torch's own Linear


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any function of torch returns in memory of its own."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.bytes, self.known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each != "reference"])
@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [(torch.float32, 8), (torch.float32, 4), (torch.bfloat16, 16)], ids=str)
def test_nothing_as_large_as_the_weight_is_allocated(stored, dtype, tokens, backend, monkeypatch):
    for module in (cpu_linear, library_linear):
        monkeypatch.setattr(module, "PANEL_ELEMENTS", 1 << 14)
    _, packed, _ = case((1, 256, 2048), stored[0], stored[1])
    x = torch.ones(tokens, 2048, dtype=dtype)
    arguments = x, packed.data, packed.scale, packed.zero, None, packed.layout
    with use_backend(backend), Largest(*arguments[: 4 if packed.scale is not None else 2]) as largest:
        products.linear(*arguments)
    # x in fp32, and a few times 64 rows of a panel as fp32
    assert largest.bytes <= max(x.numel() * 4, 1 << 19) < 256 * 2048 * 4


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_gradients_against_autograd_of_the_definition(bits):
    x, up, up_bias = case((5, 37, 70), torch.float64, bits, gated=True)
    _, down, down_bias = case((5, 11, 37), torch.float64, bits)
    up, down = (_as_float64(each) for each in (up, down))
    leaves = [x, up_bias, down_bias, *_trainable(up), *_trainable(down)]
    for leaf in leaves:
        leaf.requires_grad_()
    found = gated_mlp(x, up, down, up_bias, down_bias, activation="gelu_tanh")
    probe = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((found * probe).sum(), leaves)
    exact = oracles.gated_mlp(x, up, down, up_bias, down_bias, activation="gelu_tanh")
    wanted = torch.autograd.grad((exact * probe).sum(), leaves)
    for mine, theirs in zip(got, wanted, strict=True):
        # unpack computes quantised weights in fp32
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if bits != 16 else 1e-9, atol=1e-5 if bits != 16 else 1e-12)


def _as_float64(packed):
    """Quantised scales are fp32 at most; float64 ones show errors of the formulas."""
    if packed.bits == 16:
        return packed
    return replace(packed, scale=packed.scale.double(), zero=packed.zero.double())


def _trainable(packed):
    return [packed.data] if packed.bits == 16 else [packed.scale, packed.zero]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_opcheck(bits):
    x, packed, bias = case((3, 9, 70), bits=bits)
    _, up, up_bias = case((3, 33, 70), bits=bits, gated=True)
    _, down, down_bias = case((3, 9, 33), bits=bits)

    def tensors(packed, bias):
        return packed.data, packed.scale, packed.zero, bias, packed.layout

    x.requires_grad_()
    opcheck(torch.ops.saap.linear.default, (x, *tensors(packed, bias)))
    opcheck(torch.ops.saap.gated_linear.default, (x, *tensors(up, up_bias), "silu"))
    opcheck(torch.ops.saap.gated_mlp.default, (x, *tensors(up, up_bias), *tensors(down, down_bias), "silu"))


def test_compiles_without_graph_breaks():
    x, up, up_bias = case((3, 33, 70), bits=4, gated=True)
    _, down, down_bias = case((3, 9, 33))

    def block(x):
        return linear(gated_mlp(x, up, down, up_bias, down_bias, activation="silu"), down_t) + 1

    down_t = pack(torch.eye(9)[:7])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for each in (x, x[:2]):
        torch.testing.assert_close(compiled(each), block(each))


LINEAR_ERRORS = [
    (lambda x, w, b: (x[:, :-1], w, b), r"x: expected shape \(..., 70\), got \(3, 69\)"),
    (lambda x, w, b: (x.long(), w, b), "x: expected a floating-point dtype, got torch.int64"),
    (lambda x, w, b: ([1.0], w, b), "x: expected a tensor, got list"),
    (lambda x, w, b: (x.to("meta"), w, b), "packed: expected device meta, got cpu"),
    (lambda x, w, b: (x, w.data, b), "packed: expected a PackedWeight, as pack"),
    (lambda x, w, b: (x, replace(w, version=0), b), "packed: expected layout version 1, got 0"),
    (lambda x, w, b: (x, pack(torch.ones(2, 9, 70)), b), r"packed: expected shape \(N, K\), got \(2, 9, 70\)"),
    (lambda x, w, b: (x, w, b[:-1]), r"bias: expected shape \(9,\), got \(8,\)"),
    (lambda x, w, b: (x, w, b.half()), "bias: expected dtype torch.float32, got torch.float16"),
    (lambda x, w, b: (x, w, 1.0), "bias: expected a tensor, got float"),
]


@pytest.mark.parametrize(("spoil", "message"), LINEAR_ERRORS)
def test_bad_input_of_linear(spoil, message):
    with pytest.raises((ValueError, TypeError), match=message):
        linear(*spoil(*case((3, 9, 70))))


def test_bad_input_of_gated_ops():
    x, up, bias = case((3, 33, 70), gated=True)
    with pytest.raises(ValueError, match="activation: expected one of silu, gelu_tanh, got 'relu'"):
        gated_linear(x, up, activation="relu")
    with pytest.raises(ValueError, match=r"packed_gate_up: expected shape \(2, F, K\), got \(9, 70\)"):
        gated_linear(x, case((3, 9, 70))[1], activation="silu")
    with pytest.raises(ValueError, match=r"bias: expected shape \(2, 33\), got \(33,\)"):
        gated_linear(x, up, bias[0], activation="silu")
    with pytest.raises(ValueError, match=r"packed_down: expected shape \(D, 33\), got \(9, 70\)"):
        gated_mlp(x, up, case((3, 9, 70))[1], activation="silu")
    with pytest.raises(ValueError, match="packed_down: expected device cpu, got meta"):
        gated_mlp(x, up, pack(torch.ones(9, 33)).to("meta"), activation="silu")
    with pytest.raises(ValueError, match=r"down_bias: expected shape \(9,\), got \(8,\)"):
        gated_mlp(x, up, pack(torch.ones(9, 33)), down_bias=torch.ones(8), activation="silu")


def test_unpacked_weights_are_what_is_multiplied():
    x, packed, _ = case((2, 9, 70), bits=4)
    torch.testing.assert_close(linear(x, packed), x @ unpack(packed).T)
