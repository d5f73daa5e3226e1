"""``saap compare``: two directories side by side, with and without evaluation."""

import json

import pytest
import torch

import saap
from saap.compact import compact
from saap.comparison import compare
from tests.saap.command_line import run
from tests.saap.page import Page
from tests.saap.test_checkpoint import make_plan
from tests.saap.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model, a pruned one, one of another family and depth, and text."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("llama", torch.float32)
    saap.save(model, folder / "dense", tokenizer=tiny_tokenizer())
    saap.save(compact(model, make_plan(model)), folder / "pruned", tokenizer=tiny_tokenizer())
    saap.save(tiny_model("qwen2", torch.float32, num_hidden_layers=5), folder / "other")
    (folder / "text.txt").write_text("the quick brown fox jumps over lazy dogs. " * 5)
    return folder


def test_sizes_are_compared_without_loading_weights(models, monkeypatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    found = compare(models / "dense", models / "pruned")
    assert found.evaluation is None and found.names == ("dense", "pruned")
    assert found.differing_layers() == [(0, (4, 3), (97, 45)), (1, (4, 1), (97, 33))]
    rows = {name: (a, b, change) for name, a, b, change in found.rows()}
    assert rows["layout"] == ("stock", "template", "differs") and rows["layers"] == ("3", "3", "unchanged")
    assert rows["parameters"][2].startswith("−") and "perplexity" not in rows


def test_the_command_evaluates_and_writes_a_page(models, tmp_path) -> None:
    page = tmp_path / "page.html"
    options = ("--text", models / "text.txt", "--seq-len", 16, "--html", page)
    text = run("compare", models / "dense", models / "pruned", *options).stdout
    assert "perplexity" in text and "4 → 3" in text and "97 → 45" in text
    read = Page(page.read_text(encoding="utf-8")).check()
    assert "pruned against dense" in read.text and "2 of 3 layers differ in size" in read.text
    assert "Generated text" in read.sections and "A: dense" in read.sections["Settings"]
    again = run("compare", models / "dense", models / "pruned", "--html", page, code=2)
    assert "page.html exists already; use --force" in again.stderr
    body = json.loads(run("compare", models / "dense", models / "pruned", *options, "--force", "--json").stdout)
    assert body["evaluation"]["against"]["parameters"] == body["a"]["parameters"]
    assert body["differing_layers"][0] == {"layer": 0, "kv_heads": [4, 3], "channels": [97, 45]}


def test_models_of_another_depth_and_family_stand_side_by_side(models, tmp_path) -> None:
    found = compare(models / "other", models / "dense")
    assert found.differing_layers()[-1] == (4, (4, 0), (97, 0))
    found.save_html(tmp_path / "page.html")
    Page((tmp_path / "page.html").read_text(encoding="utf-8")).check()


def test_one_model_twice_differs_in_nothing_and_equal_names_are_told_apart(models, tmp_path) -> None:
    assert "all layers have the same sizes" in run("compare", models / "dense", models / "dense").stdout
    saap.save(tiny_model("llama", torch.float32), tmp_path / "dense")
    names = compare(models / "dense", tmp_path / "dense").names
    assert names[0] != names[1] and all(name.endswith("/dense") for name in names)


def test_perplexities_over_different_vocabularies_are_refused(models, tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["model"]["vocab"] |= {"a": vocabulary["model"]["vocab"]["b"], "b": vocabulary["model"]["vocab"]["a"]}
    saap.save(tiny_model("llama", torch.float32), tmp_path / "m", tokenizer=tokenizer)
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(vocabulary))
    result = run("compare", models / "dense", tmp_path / "m", "--text", models / "text.txt", code=2)
    assert "have different vocabularies" in " ".join(result.stderr.split())
    missing = run("compare", models / "dense", "./absent", code=2)
    assert "expected a local model directory, found none at absent" in missing.stderr
