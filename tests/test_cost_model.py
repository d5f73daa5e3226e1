"""The cost model charges for work, and predicts every row that a GPU would measure."""

import argparse
from dataclasses import replace

import pytest
import torch

from benchmarks import activation_rows, calibrate_model, calibration_kernels, weight_salience_rows
from benchmarks.common import Row
from benchmarks.cost_model import DEVICES, PREDICTED, of_device, predictions
from benchmarks.predicted_kernels import bare_product, ours
from benchmarks.predicted_models import model_rows
from benchmarks.shapes import MODELS
from benchmarks.timing import Rates
from benchmarks.weight_salience_rows import Problem

DEVICE, GATE = DEVICES[0], MODELS["Llama-2-7B"][3]
SHORT, LONG = Problem(GATE, 10, 64), Problem(GATE, 16, 2048)


def test_more_work_takes_longer_and_rows_say_that_they_are_predicted() -> None:
    more = replace(SHORT, sequences=20)
    assert ours(SHORT, DEVICE) < ours(more, DEVICE) < ours(LONG, DEVICE)
    assert ours(LONG, DEVICE) > bare_product(LONG, DEVICE)  # the same products, and an epilogue
    assert ours(LONG, DEVICE, cuda=True) > ours(LONG, DEVICE)  # mma.sync is slower than wgmma
    assert all("not measured" in row.device for row in of_device(DEVICE, quick=True))


def test_launches_that_hold_fewer_sequences_cost_more() -> None:
    many = replace(SHORT, sequences=128)
    small, large = (ours(many, DEVICE, limit=size << 20) for size in (4, 256))
    assert small > 1.05 * large == pytest.approx(1.05 * ours(many, DEVICE, limit=512 << 20), rel=0.02)


def test_small_operations_and_copies_of_gradients_are_charged() -> None:
    def ratio(**options: int) -> float:
        return next(row.ratio for row in model_rows(DEVICE, **options) if row.case.endswith("saap / LLM-Pruner"))

    assert ratio(tiny=925) > ratio(tiny=300) > ratio(tiny=0)
    assert ratio(gradient=4) < ratio(gradient=2)  # the peer's


def test_a_bound_is_missed_by_the_ratio_or_where_there_is_no_peer_by_the_value() -> None:
    row = Row("case", 3.0, 2.0, 1.5, "ms", "device", "<= 1.2")
    assert row.missed and not replace(row, asked="<= 1.50").missed and not replace(row, asked="").missed
    alone = Row("case", 0.5, None, None, "share", "device", ">= 0.9")
    assert alone.missed and not replace(alone, ours=0.9).missed
    assert replace(alone, asked="== 0").missed and not replace(alone, ours=0.2, asked="< 0.4").missed


def labels(rows) -> list[tuple[str, str, str]]:
    return sorted((row.case, row.unit, row.asked) for row in rows)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Benchmarks that take every row's path of a GPU; nothing is computed and every time and size is 1."""

    def ones(variants, *_, **__) -> dict[str, float]:
        return dict.fromkeys(variants, 1.0)

    for module in (weight_salience_rows, activation_rows):
        monkeypatch.setattr(module, "interleave", ones)
        monkeypatch.setattr(module, "peaks", ones)
    monkeypatch.setattr(weight_salience_rows, "operands", lambda *_: [()])
    monkeypatch.setattr(activation_rows, "operands", lambda *_: [(torch.empty(65536, 0),)])
    rates = Rates(1.0, 1.0, "cuda", torch.bfloat16)
    monkeypatch.setattr(calibration_kernels, "measured_rates", lambda quick: rates)
    monkeypatch.setattr(calibration_kernels, "device_kind", lambda: "cuda")
    monkeypatch.setattr(calibration_kernels.saap_kernels, "available_backends", lambda: {"cuda": "ok", "triton": "ok"})
    found = dict.fromkeys(("seconds", "bytes", "weights"), 1.0)
    setting = calibrate_model.Setting("Llama-2-7B", {}, 10, 64, torch.bfloat16, 10)
    monkeypatch.setattr(calibrate_model, "setting", lambda quick: setting)
    monkeypatch.setattr(calibrate_model, "device", lambda: "cuda")
    monkeypatch.setattr(
        calibrate_model, "measure_in_processes", lambda _module, variants, *_, **__: dict.fromkeys(variants, found)
    )


def test_every_row_that_a_gpu_would_measure_is_predicted_and_asked_the_same(pretended_gpu) -> None:
    parser = argparse.ArgumentParser()
    calibration_kernels.options(parser)
    args = parser.parse_args([])
    args.quick = False
    measured = [row for task in calibration_kernels.tasks(args) for row in task.measure()]
    measured += calibrate_model.measure(quick=False)
    predicted = [row for row in predictions(DEVICE, quick=False) if "streamed" not in row.case]
    assert labels(measured) == labels(predicted)
    assert len({label[:2] for label in labels(measured)}) == len(measured) > 1000  # a table keeps them apart
    # 25 shapes: eager and compiled at two token counts, dW of both ops at the third; 6 activation rows; whole models
    assert sum(bool(row.asked) for row in measured) == 25 * (2 * 2 + 2) + 6 + 2 + 1 + 4
    assert PREDICTED not in {row.device for row in measured}
