"""Every check of the public boundary: the message names the argument, what was expected and what came."""

import pytest
import torch

import saap_kernels as K

X, DY, W = torch.ones(6, 4), torch.ones(6, 8), torch.ones(8, 4)
SPANS = torch.tensor([[0, 3], [3, 6]], dtype=torch.int32)


def spans(*rows: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(6, 4, 1)}, "x: expected 2 dimensions, got shape"),
        ({"x": torch.ones(6, 4).long()}, "x: expected a floating-point dtype, got torch.int64"),
        ({"x": torch.ones(4, 6).T}, "x: expected last stride 1, got strides"),
        ({"dy": torch.ones(5, 8)}, "dy: expected 6 in dimension 0, got shape"),
        ({"dy": DY.double()}, "dy: expected dtype torch.float32, got torch.float64"),
        ({"dy": torch.ones(6, 8, device="meta")}, "dy: expected device cpu, got meta"),
        ({"w": torch.ones(4, 8)}, "w: expected 8 in dimension 0, got shape"),
        ({"axis": "rows"}, 'axis: expected "out" or "in", got \'rows\''),
        ({"unit_size": 3}, "unit_size: expected a positive divisor of the 8 out features, got 3"),
        ({"unit_size": 0}, "unit_size: expected a positive divisor"),
        ({"axis": "in", "unit_size": 8}, "unit_size: expected a positive divisor of the 4 in features, got 8"),
        ({"bias": torch.ones(4)}, r"bias: expected shape \(8,\), got \(4,\)"),
        ({"bias": torch.ones(8), "axis": "in"}, 'bias: expected None for axis="in"'),
        ({"want": ()}, "want: expected distinct names among abs, square, mixed"),
        ({"want": "abs"}, "want: expected distinct names among abs, square, mixed"),
        ({"want": ("abs", "first")}, "want: expected distinct names among abs, square, mixed"),
        ({"spans": SPANS.long()}, "spans: expected an int32 tensor on the CPU, got torch.int64"),
        ({"spans": [(0, 3)]}, "spans: expected an int32 tensor on the CPU, got list"),
        ({"spans": spans((0, 3)).flatten()}, r"spans: expected shape \(S, 2\)"),
        ({"spans": SPANS[:0]}, r"spans: expected shape \(S, 2\) with S >= 1"),
        ({"spans": spans((2, 2))}, r"spans: expected non-empty ranges, got \[2, 2\) at 0"),
        ({"spans": spans((0, 4), (3, 6))}, r"spans: expected increasing, disjoint ranges from 0 on, got \[3, 6\) at 1"),
        ({"spans": spans((-1, 4))}, "spans: expected increasing, disjoint ranges from 0 on"),
        ({"spans": spans((0, 7))}, r"spans: expected ranges within 6 rows, got \[0, 7\) at 0"),
    ],
)
def test_weight_salience_names_what_is_wrong(changes: dict, message: str) -> None:
    arguments = {"x": X, "dy": DY, "w": W, "spans": SPANS, "axis": "out"} | changes
    positional = [arguments.pop(name) for name in ("x", "dy", "w", "spans")]
    with pytest.raises(ValueError, match=message):
        K.weight_salience(*positional, **arguments)


def test_other_ops_check_too() -> None:
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        K.activation_statistics([1.0], SPANS)
    with pytest.raises(ValueError, match="dy: expected 4 in dimension 1, got shape"):
        K.activation_salience(X, DY, SPANS)
    with pytest.raises(ValueError, match=r"shift: expected shape \(4,\), got \(3,\)"):
        K.activation_statistics(X, SPANS, shift=torch.ones(3))
    with pytest.raises(ValueError, match="want: expected distinct names among first, second, mixed"):
        K.coupled_salience(X, DY, W, SPANS, axis="out", want=("abs",))


def test_backends_are_named_or_refused_with_the_reason(monkeypatch) -> None:
    with (
        pytest.raises(ValueError, match="backend: expected one of reference, library, cpu, triton, cuda, got 'gpu'"),
        K.use_backend("gpu"),
    ):
        pass
    monkeypatch.setenv("SAAP_BACKEND", "fast")
    with pytest.raises(ValueError, match="SAAP_BACKEND: expected one of"):
        K.weight_salience(X, DY, W, SPANS, axis="out")
    monkeypatch.setenv("SAAP_BACKEND", "cpu")
    with pytest.raises(ValueError, match="backend cpu takes fp32 tensors on the CPU, got torch.float64"):
        K.weight_salience(X.double(), DY.double(), W.double(), SPANS, axis="out")
    monkeypatch.delenv("SAAP_BACKEND")
    if not torch.cuda.is_available():
        for name in ("cuda", "triton"):
            with pytest.raises(RuntimeError, match=f"{name} cannot run here"), K.use_backend(name):
                pass


def test_available_backends_give_ok_or_a_reason() -> None:
    found = K.available_backends()
    assert list(found) == ["reference", "library", "cpu", "triton", "cuda"] and found["reference"] == "ok"
    assert all(isinstance(reason, str) and "\n" not in reason for reason in found.values())


def test_the_package_imports_without_saap_or_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, saap_kernels; assert not {'saap', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
