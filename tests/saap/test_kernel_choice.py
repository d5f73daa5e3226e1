"""The measured choice between the library's products and ours."""

import time
from importlib import import_module

import pytest
import torch

from saap import kernel_choice
from saap.checkpoint import save
from saap.compact import compact
from saap.doctor import shape_choices
from saap.kernel_choice import Timing, timing
from saap_kernels import PackedWeight, switch_points, use_backend
from saap_kernels.switch_points import table
from tests.saap.test_checkpoint import make_plan
from tests.saap.test_empty_modules import hollow_plan
from tests.saap.tiny import tiny_model

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def anew(monkeypatch) -> None:
    """Each test measures for itself, on few bytes."""
    kernel_choice._timing.cache_clear()
    monkeypatch.setattr(kernel_choice, "CACHES", 1 << 18)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("shape", [(97, 64), (97, 64, 33)])
def test_both_sides_are_measured_once(monkeypatch, shape: tuple[int, ...], bits: int | None) -> None:
    calls = []
    for name in ("linear", "gated_mlp"):
        op = getattr(kernel_choice, name)
        monkeypatch.setattr(kernel_choice, name, lambda x, *args, op=op, **kw: calls.append(args) or op(x, *args, **kw))
    found = timing(shape, bits, FP32, CPU, tokens=3)
    assert 0 < found.kernel < 1 and 0 < found.library < 1
    weights = [each for each in calls[0] if isinstance(each, PackedWeight)]
    assert [each.bits for each in weights] == [bits or 16] * (len(shape) - 1)
    wanted = [(128, 64)] if len(shape) == 2 else [(2, 128, 64), (64, 128)]  # whole lines of 64
    assert [each.shape for each in weights] == wanted
    count = len(calls)
    assert timing(shape, bits, FP32, CPU, tokens=3) is found and len(calls) == count
    assert len({id(args[0].data) for args in calls}) > 1  # weights that the caches do not hold


@pytest.mark.parametrize(("slow", "chosen"), [("linear", False), ("F", True)])
def test_what_takes_longer_is_not_chosen(monkeypatch, slow: str, chosen: bool) -> None:
    def sleepy(x, *_: object) -> None:
        time.sleep(1e-3)

    if slow == "linear":
        monkeypatch.setattr(kernel_choice, "linear", sleepy)
    else:
        monkeypatch.setattr(kernel_choice.F, "linear", sleepy)
        monkeypatch.setattr(kernel_choice, "linear", lambda x, packed: x)
    assert timing((64, 64), 8, FP32, CPU).faster is chosen


def test_other_paths_are_measured_anew(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(kernel_choice, "interleaved", lambda calls, *how: dict.fromkeys(calls, 1.0))
    monkeypatch.setenv("SAAP_SWITCH_POINTS", str(tmp_path / "points.json"))
    switch_points.forget()
    try:
        unasked = timing((64, 64), 8, FP32, CPU)
        with use_backend("reference"):
            assert timing((64, 64), 8, FP32, CPU) is not unasked
        assert timing((64, 64), 8, FP32, CPU) is unasked
        table.write(table.location(), table.device_name(CPU), {"linear float32 int8 small": [[None, "library"]]})
        switch_points.forget()
        assert timing((64, 64), 8, FP32, CPU) is not unasked
    finally:
        switch_points.forget()


def test_a_gain_within_noise_is_none() -> None:
    assert Timing(1.0, 0.8).faster and not Timing(1.0, 0.95).faster and not Timing(1.0, 1.0).faster


def test_large_matrices_are_timed_by_some_of_their_rows(monkeypatch) -> None:
    monkeypatch.setattr(kernel_choice, "ROWS_OF", 64 * 16)
    monkeypatch.setattr(
        kernel_choice, "interleaved", lambda calls, *how: {name: float(c(0).shape[1]) for name, c in calls.items()}
    )
    assert timing((128, 64), None, FP32, CPU) == Timing(128.0, 128.0)  # 16 rows, eight times


def test_doctor_measures_every_shape_of_a_directory(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(import_module("saap.doctor"), "timing", lambda *of: asked.append(of) or Timing(2.0, 1.0))
    model = tiny_model("llama", FP32)
    save(compact(model, make_plan(model)), tmp_path / "pruned")
    found = {(each.kind, each.shape): each.modules for each in shape_choices(tmp_path / "pruned") if each.bits is None}
    assert found["MLP", (45, 64, 64)] == 1 and found["Linear", (64, 45)] == 1 and found["Linear", (45, 64)] == 2
    assert (
        found["Linear", (64, 64)] == 2 and found["Linear", (24, 64)] == 2
    )  # q and o of the last layer; k, v of the first
    assert {of[1] for of in asked} == {None, 8, 4} and {of[2] for of in asked} == {FP32}
    assert {each.choice for each in shape_choices(tmp_path / "pruned")} == {"saap"}
    hollow = tiny_model("opt", FP32)
    save(compact(hollow, hollow_plan(hollow)), tmp_path / "hollow")
    assert all(0 not in each.shape for each in shape_choices(tmp_path / "hollow"))
    with pytest.raises(FileNotFoundError, match="expected a local model directory, found none"):
        list(shape_choices(tmp_path / "none"))
