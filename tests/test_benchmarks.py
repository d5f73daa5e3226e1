"""Every benchmark runs alone, and its JSON rows hold what they promise."""

import json
import math
import subprocess
import sys

import pytest
import torch

NAMES = (
    "replan", "criteria", "calibrate_model", "calibration_kernels", "calibrate_streamed", "torch_pruning_taylor",
    "cost_model", "compensation", "least_squares",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_quick_run_writes_rows(tmp_path, name: str) -> None:
    target = tmp_path / "rows.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())
    assert rows
    for row in rows:
        assert {"case", "ours", "peer", "ratio", "unit", "device"} <= set(row)
        assert math.isfinite(row["ours"])
        assert row["ours"] == 0 if row["asked"] == "== 0" else row["ours"] > 0
        assert row["peer"] is None or row["ratio"] == pytest.approx(row["ours"] / row["peer"])


def test_removing_random_units_of_the_shipped_model_clearly_hurts() -> None:
    from benchmarks.common import SMALL_MODEL
    from benchmarks.criteria import load_small_model
    from saap import calibrate, compact, score, search
    from saap.data import load_documents
    from saap.evaluate import perplexity

    model, tokenizer = load_small_model()
    statistics = calibrate(model, tokenizer, SMALL_MODEL / "calibration.jsonl", samples=16, seq_len=256)
    text = load_documents(SMALL_MODEL / "selection.jsonl")[:4]
    dense = perplexity(model, tokenizer, text)
    ratio = {}
    for name in ("saap", "random"):
        pruned = compact(model, search(score(statistics, name), 0.2), copy=True)
        ratio[name] = perplexity(pruned, tokenizer, text) / dense
    # with 24 KV groups and 4224 channels, one seed and 20 % off, random costs tens of per cent
    assert ratio["random"] > 1.3 and ratio["saap"] < 1.1


def test_results_are_one_json_and_one_markdown_table_per_device(tmp_path) -> None:
    from benchmarks.common import Row
    from benchmarks.run import write_results

    write_results(tmp_path, [Row.compare("case", 1.0, 4.0, "s", "<= 0.5"), Row.single("alone", 2.0, "GB/s")])
    (table,) = tmp_path.glob("*.md")
    assert "| case | 1.000 | 4.000 | 0.250 | s | <= 0.5 |" in table.read_text()
    assert json.loads(table.with_suffix(".json").read_text())[1]["peer"] is None


def test_the_cost_model_charges_for_more_work_and_says_that_it_predicts() -> None:
    from benchmarks.cost_model import DEVICES, Problem, bare_product, ours, rows_of
    from benchmarks.shapes import MODELS

    shape, device = MODELS["Llama-2-7B"][3], DEVICES[0]
    short, more, long = (Problem(shape, *size) for size in ((10, 64), (20, 64), (10, 2048)))
    assert ours(short, device) < ours(more, device) < ours(long, device)
    assert ours(long, device) > bare_product(long, device)  # the same products, and an epilogue
    assert ours(short, DEVICES[0]) == ours(short, DEVICES[1])  # bound by arithmetic, which the two share
    assert all("not measured" in row.device for row in rows_of(short, device))


def test_the_cost_model_predicts_every_row_that_a_gpu_would_measure(monkeypatch) -> None:
    from benchmarks import calibrate_model, calibration_kernels
    from benchmarks.cost_model import DEVICES, Problem, activation_rows, calibration_rows, rows_of
    from benchmarks.shapes import MODELS

    device, shape = DEVICES[0], MODELS["Llama-2-7B"][3]

    def cases(rows: list) -> list[tuple[str, str]]:
        return [(row.case.removeprefix(f"{device.name}: "), row.asked) for row in rows]

    def measured(rows: list) -> list[tuple[str, str]]:
        return [(row.case, row.asked) for row in rows]

    def same(variants, *_, **__) -> dict[str, float]:
        return dict.fromkeys(variants, 1.0)

    monkeypatch.setattr(calibration_kernels, "interleave", same)
    monkeypatch.setattr(calibration_kernels, "peaks", same)
    monkeypatch.setattr(calibration_kernels, "operands", lambda *_: [()])
    names = {case for case, _ in measured(calibration_kernels.weight_rows(shape, 10, 64, 1, 1.0, compiled=True))}
    assert names == {case for case, _ in cases(rows_of(Problem(shape, 10, 64), device))}
    names = {case for case, _ in measured(calibration_kernels.activation_rows(256, 64, 1.0, 1))}
    assert names == {case for case, _ in cases(activation_rows(256, 64, 128, device))}

    size = calibrate_model.Setting("Llama-2-7B", {}, 10, 64, torch.bfloat16, 10)
    monkeypatch.setattr(calibrate_model, "setting", lambda quick: size)
    monkeypatch.setattr(calibrate_model, "device", lambda: "cuda")
    ones = {"seconds": 1.0, "bytes": 1.0, "weights": 1.0}
    monkeypatch.setattr(
        calibrate_model, "measure_in_processes", lambda _module, variants, *_, **__: dict.fromkeys(variants, ones)
    )
    assert sorted(measured(calibrate_model.measure(quick=False))) == sorted(cases(calibration_rows(device)))
