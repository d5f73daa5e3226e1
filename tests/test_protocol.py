"""The 7B protocol on the shipped model: every step offline, resumed, refused, and checked against its definitions."""

import json
import math
import os
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import protocol_7b, protocol_cells
from benchmarks import zero_shot as zero_shot_module
from benchmarks.common import SMALL_MODEL
from benchmarks.protocol_table import QUOTED, numbers_of, read_results, write_table
from benchmarks.protocol_texts import HubText, joined
from benchmarks.zero_shot import TASKS
from saap import Plan

ROOT = SMALL_MODEL.parents[1]
LOCAL_TASKS = ROOT / "benchmarks" / "local_tasks"


def command(folder: Path, *more: str) -> list[str]:
    return [
        "--models", str(SMALL_MODEL), "--ratios", "0.2", "--criteria", "saap", "--seeds", "0",
        "--calibration", str(SMALL_MODEL / "calibration.jsonl"), "--samples", "8", "--seq-len", "128",
        "--perplexity-data", f"prose={folder / 'prose.txt'}", f"rows={folder / 'rows.jsonl'}", "--seq-lens", "64,128",
        "--tasks", "boolq,arc_easy", "--task-folder", str(LOCAL_TASKS), "--limit", "4",
        "--out", str(folder / "out"), *more,
    ]  # fmt: skip


def write_texts(folder: Path) -> None:
    documents = [json.loads(line)["text"] for line in (SMALL_MODEL / "report.jsonl").read_text().splitlines()[:4]]
    (folder / "prose.txt").write_text("\n\n".join(document[:3000] for document in documents[:2]))
    rows = [{"text": document[:3000]} for document in documents[2:]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder in which the command ran, in a process that may not ask the hub."""
    folder = tmp_path_factory.mktemp("protocol")
    write_texts(folder)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    run = [sys.executable, "-m", "benchmarks.protocol_7b", *command(folder)]
    finished = subprocess.run(run, capture_output=True, text=True, env=os.environ | offline, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert "[2/2] small_model 20% saap seed 0: prose 64 " in finished.stdout
    return folder


@pytest.fixture
def no_cell(monkeypatch) -> None:
    """Fail when a cell is run."""

    def run_cell(*_: object) -> None:
        raise AssertionError("a cell was run")

    monkeypatch.setattr(protocol_7b, "run_cell", run_cell)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def table_rows(file: Path) -> dict[str, list[str]]:
    lines = [line[2:-2].split(" | ") for line in file.read_text().splitlines() if line.startswith("| ")]
    return {f"{line[0]} {line[1]}": line for line in lines}


def test_every_cell_is_written_and_shown(done) -> None:
    dense, pruned = read_results(done / "out")
    assert (dense["ratio"], pruned["ratio"], pruned["criterion"], pruned["seed"]) == (None, 0.2, "saap", 0)
    assert pruned["parameters"] <= 0.8 * dense["parameters"]
    for result in (dense, pruned):
        assert {task: numbers["rows"] for task, numbers in result["tasks"].items()} == {"boolq": 4, "arc_easy": 4}
    for name, before in numbers_of(dense).items():
        if name.startswith(("prose", "rows")):
            # 20 % off the shipped model costs some tenths of its perplexity; a broken one costs orders of magnitude
            assert before < numbers_of(pruned)[name] < 3 * before
    plan, folder = Plan.load(next(done.glob("out/*/seed-0/saap-0.2.plan.json"))), next(done.glob("out/*/seed-0"))
    assert plan.units.total_parameters - plan.removed_parameters == pruned["parameters"]
    assert {file.name for file in folder.iterdir()} == {
        "statistics.safetensors", "saap-0.2.plan.json", "saap-0.2.result.json",
    }  # fmt: skip  # the checkpoint went when it had been measured


def test_the_table_holds_what_was_measured_and_nothing_else(done) -> None:
    rows = table_rows(done / "out" / "table.md")
    header, shown = rows["removed criterion"], dict(zip(rows["removed criterion"], rows["20 % saap"], strict=True))
    numbers = numbers_of(read_results(done / "out")[1])
    assert header[3:7] == ["prose 64", "prose 128", "rows 64", "rows 128"]
    for column in header[3:]:
        assert shown[column] == (f"{numbers[column]:.2f}" if column in numbers else "")
    assert shown["piqa"] == shown["mean of 7"] == ""
    assert "first 4 rows of each task" in (done / "out" / "table.md").read_text()


def test_a_second_run_does_nothing(done, no_cell, capsys) -> None:
    protocol_7b.main(command(done))
    assert "2 of 2 cells are done" in capsys.readouterr().out


def test_more_rows_may_be_asked_of_the_same_folder(done, no_cell) -> None:
    protocol_7b.main([*command(done), "--ratios", "0.2,0.5", "--criteria", "saap,element", "--table-only"])
    rows = table_rows(done / "out" / "table.md")
    assert rows["20 % saap"][3] != "" and not any(rows["50 % element"][2:])
    protocol_7b.main(command(done))  # the table of the other tests


def test_changed_settings_are_refused_with_the_differences(done, no_cell, capsys) -> None:
    with pytest.raises(SystemExit):
        protocol_7b.main([*command(done), "--samples", "9", "--tasks", "boolq"])
    error = capsys.readouterr().err
    assert "samples: 8 there, 9 now" in error and "tasks: ['boolq', 'arc_easy'] there, ['boolq'] now" in error


def test_a_changed_text_is_refused(done, tmp_path, no_cell, capsys) -> None:
    write_texts(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "other rows"}\n')
    with pytest.raises(SystemExit):
        protocol_7b.main([*command(tmp_path), "--out", str(done / "out")])
    assert "perplexity_data: " in capsys.readouterr().err


def test_an_interrupted_cell_goes_on_from_its_checkpoint(tmp_path, monkeypatch) -> None:
    write_texts(tmp_path)
    given = [*command(tmp_path), "--samples", "2", "--seq-lens", "128", "--limit", "1"]
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
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SMALL_MODEL), AutoTokenizer.from_pretrained(SMALL_MODEL)
    found = read_results(done / "out")[0]["perplexity"]
    for name, file in (("prose", "prose.txt"), ("rows", "rows.jsonl")):
        ids = torch.tensor(tokenizer(joined(str(done / file))).input_ids)
        assert (ids == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]
        for length in (64, 128):
            windows = ids[: len(ids) // length * length].view(-1, length)
            with torch.no_grad():
                logits = torch.cat([model(input_ids=window[None]).logits for window in windows])
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
            numbers = found[name][str(length)]
            assert (numbers["windows"], numbers["tokens"]) == (len(windows), windows[:, 1:].numel())
            # float32 logits of other batch sizes differ in their last digits
            assert numbers["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tasks", "boolq,nosuch", "--tasks: unknown task 'nosuch'; known: boolq, piqa"),
        ("--task-folder", "nowhere", "expected the rows of boolq in nowhere/boolq.jsonl"),
        ("--models", "nosuch", "--models: unknown model 'nosuch'; known: LLaMA-7B, Vicuna-7B, Llama-3-8B"),
        ("--models", "tests", "--models: expected a model directory with config.json, found none in tests"),
        ("--criteria", "saap,nosuch", "--criteria: expected different ones of saap, vector"),
        ("--ratios", "0.2,1.5", "ratio must lie strictly between 0 and 1; got 1.5"),
        ("--ratios", "0.99", "cannot remove 0.9900 of the model parameters: the largest reachable ratio"),
        ("--perplexity-data", "nosuch", "--perplexity-data: unknown text 'nosuch'; known: wikitext2, ptb"),
        ("--perplexity-data", "short=README.md", "unknown text 'README.md'"),
        ("--calibration", "nosuch.txt", "--calibration: no such file: nosuch.txt"),
        ("--seq-lens", "1024", "1024 exceeds the 512 positions of small_model"),
        ("--seq-lens", "1", "--seq-lens: expected at least 2; got 1"),
        ("--limit", "0", "--limit: expected at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named_before_any_work(tmp_path, no_cell, capsys, option, value, message) -> None:
    write_texts(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        protocol_7b.main([*command(tmp_path), option, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_shorter_than_a_window_is_named(tmp_path, no_cell, capsys) -> None:
    write_texts(tmp_path)
    (tmp_path / "prose.txt").write_text("a few words")
    with pytest.raises(SystemExit):
        protocol_7b.main(command(tmp_path))
    assert "prose has 5 tokens, fewer than one window of 128" in capsys.readouterr().err


def test_a_dry_run_says_what_is_needed_without_the_hub(tmp_path, no_cell, monkeypatch, capsys) -> None:
    monkeypatch.setattr(socket, "socket", None)  # any connection is an error
    protocol_7b.main(["--dry-run", "--out", str(tmp_path / "out"), "--models", "LLaMA-7B", "Llama-3-8B", "some/other"])
    shown = capsys.readouterr().out
    assert "63 cells" in shown and "Llama-3-8B 50% element seed 4" in shown
    assert "parameters: 6,738,415,616 in float16" in shown and "parameters: 8,030,261,248 in bfloat16" in shown
    assert "checkpoint: 10.04 GiB at 20%, 6.28 GiB at 50%" in shown and "unknown until its configuration" in shown
    assert not (tmp_path / "out").exists()


def test_seeds_are_averaged_and_quoted_rows_are_marked(tmp_path) -> None:
    args = protocol_7b.arguments(["--models", "LLaMA-7B", "--seeds", "0,1"])
    models = protocol_7b.parse_models(args.models)
    common = {
        "model": "LLaMA-7B",
        "ratio": 0.2,
        "criterion": "saap",
        "device": "here",
        "dtype": "float16",
        "versions": {},
    }
    results = [
        common | {"perplexity": {"wikitext2": {"128": {"perplexity": value}}}, "tasks": {t: dict.fromkeys(
            ("acc", "acc_norm"), value / 40) for t in TASKS}}
        for value in (14.0, 16.0)
    ]  # fmt: skip
    cells = protocol_7b.grid(models, (0.2, 0.5), args)
    write_table(tmp_path / "table.md", cells, results, protocol_7b.settings_of(args))
    rows = table_rows(tmp_path / "table.md")
    assert rows["20 % saap"][2:5] == ["2", "15.00 ± 1.41", ""] and rows["20 % saap"][-1] == "37.50 ± 3.54"
    quoted = [row for name, row in rows.items() if "(quoted)" in name]
    assert len(quoted) == sum(row.model == "LLaMA-7B" for row in QUOTED)
    assert all(cell.startswith("*") for row in quoted for cell in row[2:] if cell)


def test_the_committed_table_is_what_the_command_writes(tmp_path) -> None:
    committed = (ROOT / "docs" / "protocol_7b.md").read_text()
    if "Measured on: nothing yet" not in committed:
        pytest.skip("the protocol was run, and its numbers are not at hand here")
    protocol_7b.main(["--table-only", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == committed


def test_hub_rows_become_documents(tmp_path) -> None:
    rows = datasets.Dataset.from_dict({"sentence": ["one", "", "two", "three", "four"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    options = {"data_files": str(tmp_path / "rows.parquet")}
    text = HubText("parquet", "", column="sentence", options=options)
    assert text.load() == ["one", "", "two", "three", "four"]
    assert HubText("parquet", "", "train", "sentence", options, rows=4, per_document=3).load() == ["one  two", "three"]
    with pytest.raises(ValueError, match="cannot load parquet: .*give a local file instead"):
        HubText("parquet", "", options={"data_files": str(tmp_path / "missing.parquet")}).load()


def test_without_lm_eval_the_command_says_how_to_get_it(tmp_path, no_cell, monkeypatch, capsys) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(zero_shot_module, "version", missing)
    write_texts(tmp_path)
    with pytest.raises(SystemExit):
        protocol_7b.main(command(tmp_path))
    assert 'the zero-shot tasks need lm_eval: pip install "saap[eval]"' in capsys.readouterr().err


def test_criteria_that_read_coupled_statistics_have_their_own(done, tmp_path) -> None:
    args = protocol_7b.arguments([*command(done), "--criteria", "llm_pruner", "--out", str(tmp_path / "out")])
    models = protocol_7b.parse_models(args.models)
    settings, (_, cell) = protocol_7b.settings_of(args), protocol_7b.grid(models, (0.2,), args)
    inputs = protocol_7b.read_inputs(models, (0.2,), settings)
    protocol_cells._prune(cell, settings, inputs, AutoTokenizer.from_pretrained(SMALL_MODEL), tmp_path / "out")
    assert {file.name for file in cell.stem(tmp_path / "out").parent.iterdir()} == {
        "coupled-statistics.safetensors", "llm_pruner-0.2", "llm_pruner-0.2.plan.json",
    }  # fmt: skip
