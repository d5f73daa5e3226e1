"""The peers of the calibration ops compute what the ops do, or the comparison would say nothing."""

import pytest
import torch

import saap_kernels as K
from benchmarks import eager_forms
from benchmarks.activation_rows import FORMS

SEQUENCES, LENGTH = 3, 8
SPANS = torch.tensor([[0, 8], [8, 16], [16, 24]], dtype=torch.int32)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.mark.parametrize(("axis", "unit"), [("out", 1), ("out", 6), ("in", 1), ("in", 4)])
@pytest.mark.parametrize("form", ["whole_salience", "tiled_salience", "reference_salience", "coupled"])
def test_weight_peers(form: str, axis: str, unit: int, monkeypatch) -> None:
    x, dy, w = draw(24, 20), draw(24, 12), draw(12, 20)
    monkeypatch.setitem(eager_forms.PANEL_BYTES, "cpu", 6 * 20 * 4)  # two panels
    assert eager_forms.panel_rows(12, 20, 1, 6 * 20) == 6
    got = getattr(eager_forms, form)(x, dy, w, SEQUENCES, axis, unit)
    op = K.coupled_salience if form == "coupled" else K.weight_salience
    wanted = op(x, dy, w, SPANS, axis=axis, unit_size=unit)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.max()))  # fp32 sums of few terms


@pytest.mark.parametrize("op", list(FORMS))
def test_activation_peers(op: str) -> None:
    operands = [draw(24, 20)] if op == "activation_statistics" else [draw(24, 20), draw(24, 20) + 1]
    wanted = getattr(K, op)(*operands, SPANS)
    wanted = [wanted[0], *wanted[1]] if isinstance(wanted, tuple) else [*wanted] if wanted.ndim == 3 else [wanted]
    first, strongest = FORMS[op]
    for name in (first, strongest):
        got = getattr(eager_forms, name)(*operands, SEQUENCES)
        got = [*got] if isinstance(got, tuple) else [got]
        if name == strongest and len(got) > 1:
            got[-2] = got[-2].square()  # a norm: the sum of squares is its square, of S x K values
        for mine, other in zip(wanted, got, strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-5)
