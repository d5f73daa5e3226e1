"""Edges every backend must pass; ``run`` maps an op's name and its arguments to that backend's result."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels import oracles

Run = Callable[..., Tensor]
PITCH = 1 << 29  # elements: the sixth row starts behind 2^31


def one_token(run: Run, dtype: torch.dtype, device: str = "cpu") -> None:
    """T = 1 and a single sequence: dW is the outer product of two rows."""
    generator = torch.Generator().manual_seed(0)
    x, dy, w = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((1, 24), (1, 16), (16, 24)))
    spans = torch.tensor([[0, 1]], dtype=torch.int32)
    got = run("weight_salience", x, dy, w, spans, axis="out", unit_size=4)
    exact = oracles.weight_salience(x.cpu(), dy.cpu(), w.cpu(), spans, axis="out", unit_size=4)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)  # fp32: positive terms, 96 of them
    signed = run("activation_salience", x, x, spans)
    torch.testing.assert_close(signed.double(), x.cpu().double().square(), rtol=1e-6, atol=0)


def zero_gradient(run: Run, dtype: torch.dtype, device: str = "cpu") -> None:
    """dy = 0 gives zeros, not NaN, in every op that multiplies by it."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((9, 24), (16, 24)))
    dy, dx = torch.zeros(9, 16, dtype=dtype, device=device), torch.zeros_like(x)
    spans = torch.tensor([[0, 4], [4, 9]], dtype=torch.int32)
    for axis in ("out", "in"):
        for op in ("weight_salience", "coupled_salience"):
            assert not run(op, x, dy, w, spans, axis=axis, unit_size=2).any()
    assert not run("activation_salience", x, dx, spans).any()


def parts_of_a_fused_linear(run: Run, dtype: torch.dtype, device: str = "cpu") -> None:
    """Row ranges of w and column ranges of dy and y, at any alignment, beside NaN that is never read."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 24), (9, 43), (9, 43), (43, 24))
    x, y, dy, w = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    spans = torch.tensor([[0, 4], [4, 9]], dtype=torch.int32)
    for start, stop in ((0, 16), (16, 27), (27, 43)):
        part = slice(start, stop)
        alone_dy, alone_w = torch.full_like(dy, float("nan")), torch.full_like(w, float("nan"))
        alone_dy[:, part], alone_w[part] = dy[:, part], w[part]
        for axis in ("out", "in"):
            got = run("weight_salience", x, alone_dy[:, part], alone_w[part], spans, axis=axis)
            exact = oracles.weight_salience(x.cpu(), dy[:, part].cpu(), w[part].cpu(), spans, axis=axis)
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)  # fp32: positive terms, 24 at most
        signed = run("activation_salience", y[:, part], alone_dy[:, part], spans).double()
        terms = [y[a:b, part].cpu().double() * dy[a:b, part].cpu().double() for a, b in spans.tolist()]
        bound = torch.stack([term.abs().sum(0) for term in terms]) * 5 * 2**-23  # one rounding per term
        assert ((signed - torch.stack([term.sum(0) for term in terms])).abs() <= bound).all()


def offsets_past_2_to_the_31(run: Run, dtype: torch.dtype, device: str = "cpu") -> None:
    """Rows whose elements lie behind 2^31, in a storage of which only the pages of six rows are ever touched."""
    # not torch.empty, which conftest.py fills with NaN: that would touch every page
    storage = torch.empty_strided((5 * PITCH + 64,), (1,), dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    far = storage.as_strided((6, 24), (PITCH, 1))
    far.copy_(torch.randn(6, 24, generator=generator))
    near = far.contiguous()
    other = torch.randn(6, 16, generator=generator).to(device, dtype)
    w = torch.randn(16, 24, generator=generator).to(device, dtype)
    spans = torch.tensor([[0, 2], [2, 6]], dtype=torch.int32)

    def equal(op: str, there: tuple[Tensor, ...], here: tuple[Tensor, ...], **options: object) -> None:
        assert torch.equal(run(op, *there, spans, **options), run(op, *here, spans, **options)), op

    for axis in ("out", "in"):
        equal("weight_salience", (far, other, w), (near, other, w), axis=axis)  # x
        equal("weight_salience", (other, far, w.T.contiguous()), (other, near, w.T.contiguous()), axis=axis)  # dy
        weight = torch.randn(6, 6, generator=generator).to(device, dtype)
        equal(
            "weight_salience", (weight, other[:, :6], far[:, :6]), (weight, other[:, :6], near[:, :6]), axis=axis
        )  # w
    equal("activation_salience", (far, near), (near, near))
    equal("activation_statistics", (far,), (near,))


EDGES = (one_token, zero_gradient, parts_of_a_fused_linear, offsets_past_2_to_the_31)
