"""The 7B protocol beside its run: what is refused, what a dry run says, its table, and what it asks the hub for."""

import inspect
import json
import shutil
import socket
from importlib.metadata import PackageNotFoundError
from urllib.parse import unquote

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import protocol_7b
from benchmarks import zero_shot as zero_shot_module
from benchmarks.common import SMALL_MODEL
from benchmarks.protocol_table import MEAN, QUOTED, write_table
from benchmarks.protocol_texts import TEXTS, HubText
from benchmarks.zero_shot import TASKS, zero_shot
from tests.test_protocol_run import LOCAL_TASKS, PAGE, command, no_cell_fixture, own_cache_fixture, prepare, table_rows  # noqa: F401  fixtures


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
        ("--seq-lens", "4096", "4096 exceeds the 2048 positions of small_model"),
        ("--seq-lens", "1", "--seq-lens: expected at least 2; got 1"),
        ("--limit", "0", "--limit: expected at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named_before_any_work(tmp_path, no_cell, capsys, option, value, message) -> None:
    prepare(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        protocol_7b.main([*command(tmp_path), "--out", str(tmp_path / "out"), option, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_coupled_statistics_without_memory_are_refused_before_any_cell(tmp_path, no_cell, monkeypatch, capsys) -> None:
    prepare(tmp_path)
    coupled = [*command(tmp_path), "--out", str(tmp_path / "out"), "--criteria", "saap,llm_pruner"]
    monkeypatch.setattr("benchmarks.protocol_models.available_bytes", lambda device: 30 * 2**20)
    with pytest.raises(SystemExit) as stopped:
        protocol_7b.main(coupled)
    message = "error: --criteria: small_model: coupled statistics take all "
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()
    # streamed by the size that it has on disk, of which a block and its activations have room
    monkeypatch.setattr("benchmarks.protocol_models.available_bytes", lambda device: 16 * 2**20)
    with pytest.raises(AssertionError, match="a cell was run"):
        protocol_7b.main([*coupled, "--dtype", "float16"])
    shutil.rmtree(tmp_path / "out")
    plain = [*coupled[:-1], "saap"]
    with pytest.raises(AssertionError, match="a cell was run"):
        protocol_7b.main(plain)


def test_a_text_shorter_than_a_window_is_named(tmp_path, no_cell, capsys) -> None:
    prepare(tmp_path)
    (tmp_path / "prose.txt").write_text("a few words")
    with pytest.raises(SystemExit):
        protocol_7b.main([*command(tmp_path), "--out", str(tmp_path / "out")])
    assert "wikitext2 has 5 tokens, fewer than one window of 2048" in capsys.readouterr().err


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
    committed = PAGE.read_text()
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
    prepare(tmp_path)
    with pytest.raises(SystemExit):
        protocol_7b.main([*command(tmp_path), "--out", str(tmp_path / "out")])
    assert 'the zero-shot tasks need lm_eval: pip install "saap[eval]"' in capsys.readouterr().err


def test_the_hub_is_asked_for_the_texts_of_the_published_evaluation(monkeypatch) -> None:
    asked = []
    signature = inspect.signature(datasets.load_dataset)

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        given = signature.bind(*args, **options).arguments
        asked.append((given["path"], given.get("name"), given.get("data_files"), given["split"]))
        return [{"text": "a row", "sentence": "a row"}] * 70

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = {name: len(TEXTS[name].load()) for name in ("wikitext2", "ptb", "bookcorpus")}
    assert documents == {"wikitext2": 70, "ptb": 70, "bookcorpus": 2}
    parquet = "hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/validation/0000.parquet"
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test")
    assert (asked[1][0], unquote(asked[1][2])) == ("parquet", parquet)
    assert asked[2] == ("rojagtap/bookcorpus", None, None, "train")


# data set, configuration, and the split that the published accuracies are of
HUB_TASKS = {
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "piqa": ("baber/piqa", None, "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
}


def test_without_a_folder_the_tasks_come_from_the_hub(monkeypatch) -> None:
    rows = {
        (name, config): [json.loads(line) for line in (LOCAL_TASKS / f"{task}.jsonl").read_text().splitlines()]
        for task, (name, config, _) in HUB_TASKS.items()
    }
    sizes = {"train": 1, "validation": 2, "test": 3}

    def load_dataset(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
        splits = {split: datasets.Dataset.from_list(rows[path, name][:count]) for split, count in sizes.items()}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SMALL_MODEL), AutoTokenizer.from_pretrained(SMALL_MODEL)
    found = zero_shot(model, tokenizer, tuple(TASKS))
    assert {task: found[task]["rows"] for task in TASKS} == {task: sizes[HUB_TASKS[task][2]] for task in TASKS}


def test_quoted_means_are_of_their_tasks_and_stand_in_the_columns_of_the_page() -> None:
    columns = table_rows(PAGE)["removed criterion"][3:]
    assert all(set(row.numbers) <= set(columns) for row in QUOTED)
    complete = [row.numbers for row in QUOTED if set(TASKS) <= set(row.numbers)]
    assert len(complete) == 2
    for numbers in complete:
        # seven numbers and their mean, each rounded to two decimals
        assert sum(float(numbers[task]) for task in TASKS) / 7 == pytest.approx(float(numbers[MEAN]), abs=0.0101)
