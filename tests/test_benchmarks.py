"""Every benchmark runs alone, and its JSON rows hold what they promise."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

NAMES = (
    "replan", "criteria", "calibrate_model", "calibration_kernels", "calibrate_streamed", "torch_pruning_taylor",
    "cost_model", "compensation", "least_squares", "latency_table", "single_units", "decode", "compact_gemm",
    "end_to_end", "quantised", "quantisation_rounding", "recovery", "recovery_step", "target_cost",
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
        if row["unit"] == "rho":  # a rank correlation
            assert -1 <= row["ours"] <= 1
        elif row["unit"] == "recovered":  # a share, negative where tuning made it worse
            assert row["ours"] <= 1
        elif row["case"].endswith("peak memory"):  # above a start whose pages may do for the call
            assert row["ours"] >= 0
        else:
            assert row["ours"] == 0 if row["asked"] == "== 0" else row["ours"] > 0
        assert row["peer"] is None or row["ratio"] == pytest.approx(row["ours"] / row["peer"])


def test_removing_random_units_of_the_shipped_model_clearly_hurts() -> None:
    from benchmarks.common import SMALL_MODEL
    from benchmarks.criteria import load_model
    from saap import calibrate, compact, score, search
    from saap.data import load_documents
    from saap.evaluate import perplexity

    model, tokenizer = load_model()
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
    from benchmarks.results import Results

    results = Results(tmp_path)
    results.add("one", Row.compare("case", 1.0, 4.0, "s", "<= 0.5"))
    results.add("two", Row.single("alone", 2.0, "GB/s"))
    (table,) = tmp_path.glob("*.md")
    assert "| case | 1.000 | 4.000 | 0.250 | s | <= 0.5 |" in table.read_text()
    found = json.loads(table.with_suffix(".json").read_text())
    assert found["rows"][1]["peer"] is None and found["finished"] == []


def test_results_merge_by_task_and_start_anew_with_other_versions(tmp_path, monkeypatch) -> None:
    from benchmarks import results as module
    from benchmarks.common import Row
    from benchmarks.results import Results

    def cases() -> list[tuple[str, float]]:
        return [(row["case"], row["ours"]) for row in Results(tmp_path).rows.values()]

    first = Results(tmp_path)
    for case in ("kept", "gone"):
        first.add("task", Row.single(case, 1.0, "s"))
    first.add("other", Row.single("kept", 3.0, "s"))
    again = Results(tmp_path)
    row = Row.single("kept", 2.0, "s")
    again.add("task", row)
    assert cases() == [("kept", 2.0), ("gone", 1.0), ("kept", 3.0)]  # an interruption here loses nothing
    again.finish("task", [row])
    assert cases() == [("kept", 2.0), ("kept", 3.0)] and Results(tmp_path).finished == ["task"]
    monkeypatch.setattr(module, "triton_version", lambda: "0.0")
    assert cases() == []


TASKS = """
import sys, time
from benchmarks.common import Row
from benchmarks.tasks import Task, run_tasks
def slow():
    yield Row.single("before", 1.0, "s")
    time.sleep({seconds})
    {after}
run_tasks("", lambda args: [Task("quick", lambda: [Row.single("first", 1.0, "s")]), Task("slow", slow)])
"""


def run_module_of_tasks(tmp_path, monkeypatch, seconds: float, after: str, options: list[str], limit: float):
    """``benchmarks.run.run_module`` on a module written here."""
    from benchmarks import run

    (tmp_path / "benchmarks").mkdir(exist_ok=True)
    (tmp_path / "benchmarks" / "planted.py").write_text(TASKS.format(seconds=seconds, after=after))
    (tmp_path / "benchmarks" / "__init__.py").write_text(
        f"__path__.append({str(Path(run.__file__).parent)!r})\n"  # the other modules are where they are
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return run.run_module("planted", ["--results", str(tmp_path / "results"), *options], limit)


def rows_written(tmp_path) -> list[str]:
    return [row["case"] for row in json.loads(next((tmp_path / "results").glob("*.json")).read_text())["rows"]]


def test_a_module_out_of_time_is_stopped_and_its_rows_stay(tmp_path, monkeypatch) -> None:
    start = time.monotonic()
    good, rows = run_module_of_tasks(tmp_path, monkeypatch, 600, "", [], limit=20)
    assert time.monotonic() - start < 60
    assert good and [row.case for row in rows] == ["first", "before"] == rows_written(tmp_path)


def test_a_failing_module_is_reported_and_its_rows_stay(tmp_path, monkeypatch) -> None:
    good, rows = run_module_of_tasks(tmp_path, monkeypatch, 0, "raise RuntimeError('planted')", [], limit=60)
    assert not good and len(rows) == 2 == len(rows_written(tmp_path))
    good, rows = run_module_of_tasks(tmp_path, monkeypatch, 0, "", ["--resume"], limit=60)
    assert good and [row.case for row in rows] == ["before"]  # the task that was whole is not measured again


def test_a_budget_starts_no_task_after_its_end(tmp_path, monkeypatch, capfd) -> None:
    good, rows = run_module_of_tasks(tmp_path, monkeypatch, 0, "", ["--minutes", "1e-9"], limit=60)
    assert good and rows == [] and "out of time; not measured: quick, slow" in capfd.readouterr().out


def test_every_scheduled_benchmark_is_a_module_and_the_valuable_ones_come_first() -> None:
    from benchmarks.run import BENCHMARKS

    assert {name for name, _ in BENCHMARKS} <= set(NAMES)
    assert [name for name, _ in BENCHMARKS][:2] == ["calibration_kernels", "calibrate_model"]
