"""The 7B protocol end to end on the shipped model: the default grid, offline, killed, resumed and checked."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import protocol_7b, protocol_cells
from benchmarks.common import SMALL_MODEL
from benchmarks.protocol_table import numbers_of, read_results
from benchmarks.protocol_texts import joined
from benchmarks.zero_shot import TASKS
from saap import Plan

ROOT = SMALL_MODEL.parents[1]
LOCAL_TASKS = ROOT / "benchmarks" / "local_tasks"
PAGE = ROOT / "docs" / "protocol_7b.md"
PRUNED = ["saap-0.2", "element-0.2", "saap-0.5", "element-0.5"]


def command(folder: Path, *more: str) -> list[str]:
    """The default grid, tasks and lengths on the files of ``prepare``, instead of the hub's models and texts."""
    return [
        "--models", str(folder / "small_model"), "--seeds", "0",
        "--calibration", str(SMALL_MODEL / "calibration.jsonl"), "--samples", "8", "--seq-len", "128",
        "--perplexity-data", f"wikitext2={folder / 'prose.txt'}", f"ptb={folder / 'rows.jsonl'}",
        "--task-folder", str(LOCAL_TASKS), "--limit", "1", *more,
    ]  # fmt: skip


def prepare(folder: Path) -> None:
    """Two texts, the shipped model with the 2048 positions of a 7B one, and a copy of the page with the table."""
    documents = [
        json.loads(line)["text"][:3500] for line in (SMALL_MODEL / "report.jsonl").read_text().splitlines()[:6]
    ]
    (folder / "prose.txt").write_text("\n\n".join(documents[:3]))
    rows = [{"text": document.replace(" the ", " <s> ")} for document in documents[3:]]  # a special token's name
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = folder / "small_model"
    model.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (model / name).symlink_to(SMALL_MODEL / name)
    config = json.loads((SMALL_MODEL / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (model / "config.json").write_text(json.dumps(config))
    (folder / "docs").mkdir()
    shutil.copy(PAGE, folder / "docs")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder in which the command ran, killed after two of five cells and started again; it may not ask the hub."""
    folder = tmp_path_factory.mktemp("protocol")
    prepare(folder)
    committed = PAGE.read_bytes()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    run = [sys.executable, "-m", "benchmarks.protocol_7b", *command(folder)]
    options = {"text": True, "env": os.environ | offline | {"PYTHONPATH": str(ROOT)}, "cwd": folder}
    with (folder / "errors.txt").open("w") as errors:
        first = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=errors, **options)
        assert first.stdout is not None
        reached = any(line.startswith("[2/5] small_model 20% saap seed 0: wikitext2 128 ") for line in first.stdout)
        first.kill()
        first.wait()
    assert reached, (folder / "errors.txt").read_text()
    second = subprocess.run(run, capture_output=True, **options)
    assert second.returncode == 0, second.stderr
    assert "2 of 5 cells are done" in second.stdout and "[3/3] small_model 50% element seed 0" in second.stdout
    assert PAGE.read_bytes() == committed
    return folder


@pytest.fixture(name="no_cell")
def no_cell_fixture(monkeypatch) -> None:
    """Fail when a cell is run."""

    def run_cell(*_: object) -> None:
        raise AssertionError("a cell was run")

    monkeypatch.setattr(protocol_7b, "run_cell", run_cell)


@pytest.fixture(autouse=True)
def own_cache_fixture(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def again(done: Path, *more: str) -> None:
    """The command in this process, on the results of ``done``; its table goes beside them."""
    protocol_7b.main([*command(done), "--out", str(done / "build/protocol_7b"), *more])


def results_of(done: Path) -> dict[str, dict]:
    """Results by the names of their files."""
    found = {}
    for file in done.glob("build/protocol_7b/**/*.result.json"):
        found[file.name.removesuffix(".result.json")] = json.loads(file.read_text())
    return found


def table_rows(file: Path) -> dict[str, list[str]]:
    """The last section's rows by what was removed and the criterion."""
    section = file.read_text().split("\n## ")[-1]
    lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {f"{line[0]} {line[1]}": line for line in lines}


def test_every_cell_of_the_default_grid_is_measured(done) -> None:
    results = results_of(done)
    assert sorted(results) == sorted(["dense", *PRUNED])
    for name, result in results.items():
        assert {task: numbers["rows"] for task, numbers in result["tasks"].items()} == dict.fromkeys(TASKS, 1)
        assert {text: list(found) for text, found in result["perplexity"].items()} == dict.fromkeys(
            ("wikitext2", "ptb"), ["128", "2048"]
        )
        ratio = 0.0 if name == "dense" else float(name.split("-")[1])
        assert (result["ratio"] or 0.0) == ratio
        assert result["parameters"] <= (1 - ratio) * results["dense"]["parameters"]


def test_perplexity_rises_with_what_is_removed(done) -> None:
    numbers = {name: numbers_of(result) for name, result in results_of(done).items()}
    for text in ("wikitext2 128", "ptb 128"):  # at 2048 the shipped model, trained on 512, measures nothing
        for criterion in ("saap", "element"):
            dense, fifth, half = (numbers[name][text] for name in ("dense", f"{criterion}-0.2", f"{criterion}-0.5"))
            # 20 % off the shipped model costs some tenths of its perplexity; a broken one costs orders of magnitude
            assert dense < fifth < min(half, 3 * dense)


def test_plans_stay_and_checkpoints_go(done) -> None:
    folder = next(done.glob("build/protocol_7b/*/seed-0"))
    kept = {f"{name}.{kind}.json" for name in PRUNED for kind in ("plan", "result")}
    assert {file.name for file in folder.iterdir()} == kept | {"statistics.safetensors"}
    for name in PRUNED:
        plan = Plan.load(folder / f"{name}.plan.json")
        assert plan.units.total_parameters - plan.removed_parameters == results_of(done)[name]["parameters"]


def test_the_table_has_the_rows_and_columns_of_the_committed_page_and_holds_what_was_measured(done) -> None:
    page = (done / "docs/protocol_7b.md").read_text()
    rows, committed = table_rows(done / "docs/protocol_7b.md"), table_rows(PAGE)
    assert list(rows) == [name for name in committed if "(quoted)" not in name]
    header, measured = rows["removed criterion"], results_of(done)
    assert header == committed["removed criterion"] and len(header) == 15
    for name, result in zip(["0 % dense", "20 % saap", "20 % element", "50 % saap", "50 % element"], ["dense", *PRUNED],
                            strict=True):  # fmt: skip
        numbers = numbers_of(measured[result])
        assert rows[name][2:] == ["1", *(f"{numbers[column]:.2f}" for column in header[3:])]
        assert numbers["mean of 7"] == pytest.approx(sum(numbers[task] for task in TASKS) / 7)
    assert "first 1 rows of each task" in page and "rows come from a local folder" in page


def test_a_second_run_does_nothing(done, no_cell, capsys) -> None:
    again(done)
    assert "5 of 5 cells are done" in capsys.readouterr().out


def test_more_rows_may_be_asked_of_the_same_folder(done, no_cell) -> None:
    again(done, "--criteria", "saap,flap", "--table-only")
    rows = table_rows(done / "build/protocol_7b/table.md")
    assert rows["20 % saap"][3] != "" and rows["50 % element"][3] != "" and not any(rows["50 % flap"][2:])


def test_changed_settings_are_refused_with_the_differences(done, no_cell, capsys) -> None:
    with pytest.raises(SystemExit):
        again(done, "--samples", "9", "--tasks", "boolq")
    error = capsys.readouterr().err
    assert "samples: 8 there, 9 now" in error and "'openbookqa'] there, ['boolq'] now" in error


def test_a_changed_text_is_refused(done, tmp_path, no_cell, capsys) -> None:
    prepare(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "other rows"}\n')
    with pytest.raises(SystemExit):
        again(done, "--perplexity-data", f"wikitext2={tmp_path / 'prose.txt'}", f"ptb={tmp_path / 'rows.jsonl'}")
    assert "perplexity_data: " in capsys.readouterr().err


def test_an_interrupted_cell_goes_on_from_its_checkpoint(tmp_path, monkeypatch) -> None:
    prepare(tmp_path)
    less = ["--ratios", "0.2", "--criteria", "saap", "--samples", "2", "--seq-lens", "128", "--tasks", "boolq"]
    given = [*command(tmp_path), *less, "--out", str(tmp_path / "out")]
    real, calls = protocol_cells.zero_shot, []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(protocol_cells, "zero_shot", interrupted)
    with pytest.raises(SystemExit, match="130"):
        protocol_7b.main(given)
    checkpoint = next(tmp_path.glob("out/*/seed-0/saap-0.2"))
    assert (checkpoint / "model.safetensors").is_file() and len(read_results(tmp_path / "out")) == 1
    monkeypatch.setattr(protocol_cells, "_prune", None)  # neither calibrated nor pruned again
    protocol_7b.main(given)
    assert len(read_results(tmp_path / "out")) == 2 and not checkpoint.exists() and len(calls) == 3


def test_perplexity_is_of_one_stream_cut_into_whole_windows(done) -> None:
    folder = done / "small_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = results_of(done)["dense"]["perplexity"]
    for name, file in (("wikitext2", "prose.txt"), ("ptb", "rows.jsonl")):
        text = joined(str(done / file))
        assert ("<s>" in text) == (name == "ptb")
        ids = torch.tensor(tokenizer(text, split_special_tokens=True).input_ids)
        assert (ids == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]
        for length in (128, 2048):
            windows = ids[: len(ids) // length * length].view(-1, length)
            with torch.no_grad():
                logits = torch.cat([model(input_ids=window[None]).logits for window in windows])
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
            numbers = found[name][str(length)]
            assert (numbers["windows"], numbers["tokens"]) == (len(windows), windows[:, 1:].numel())
            # float32 logits of other batch sizes differ in their last digits
            assert numbers["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_criteria_that_read_coupled_statistics_have_their_own(done, tmp_path) -> None:
    args = protocol_7b.arguments([*command(done), "--criteria", "llm_pruner", "--out", str(tmp_path / "out")])
    models = protocol_7b.parse_models(args.models)
    settings, (_, cell) = protocol_7b.settings_of(args), protocol_7b.grid(models, (0.2,), args)
    inputs = protocol_7b.read_inputs(models, (0.2,), settings)
    protocol_cells._prune(cell, settings, inputs, AutoTokenizer.from_pretrained(SMALL_MODEL), tmp_path / "out")
    assert {file.name for file in cell.stem(tmp_path / "out").parent.iterdir()} == {
        "coupled-statistics.safetensors", "llm_pruner-0.2", "llm_pruner-0.2.plan.json",
    }  # fmt: skip
