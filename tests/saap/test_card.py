"""The model card: metadata that the hub reads, how the model was made, no path of this machine."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

import saap
from saap.card import Made, hub_name, told_name
from saap.serving.gguf_export import TYPES, export_gguf
from tests.saap.command_line import run
from tests.saap.test_checkpoint import make_plan
from tests.saap.test_cli import workplace  # noqa: F401
from tests.saap.tiny import FAMILIES, tiny_model
from tests.serving.gguf_models import LLAMA3_ROPE


def card(folder) -> ModelCard:
    found = ModelCard.load(folder / "README.md")
    assert found.data.library_name == "transformers" and found.data.pipeline_tag == "text-generation"
    assert found.data.tags == ["pruned", "saap"]
    return found


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_checkpoint_has_a_card_that_the_hub_reads(tmp_path, family: str, shape: str) -> None:
    model = tiny_model(family, torch.float32)
    saap.save(saap.compact(model, make_plan(model, shape)), tmp_path / "m")
    found = card(tmp_path / "m")
    assert found.data.base_model is None and found.data.eval_results is None
    assert f"| parameters | {model.num_parameters():,} |" in found.text and "## How it was made" in found.text
    stock = shape == "uniform" and family != "opt"
    assert ("trust_remote_code=True" in found.text) is not stock
    for line in ("saap serve THIS_DIRECTORY", "vllm serve THIS_DIRECTORY"):
        assert line in found.text


GGUF = "saap export THIS_DIRECTORY --gguf model.gguf --type "


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_advises_a_gguf_file_where_one_can_be_made(tmp_path, family: str, shape: str) -> None:
    model = tiny_model(family, torch.float32)
    saap.save(saap.compact(model, make_plan(model, shape)), tmp_path / "m")
    told = [kind for kind in TYPES if GGUF + kind in card(tmp_path / "m").text]
    if told:
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", type=told[0], tell=list)
    else:
        with pytest.raises(ValueError):
            export_gguf(tmp_path / "m", tmp_path / "m.gguf", type="f16", tell=list)
    possible = family in ("llama", "mistral", "qwen2")  # the tiny qwen3 has biases, which llama.cpp's has not
    kind = "q8_0" if shape == "uniform" else "f16"  # the others have rows of no whole number of blocks
    assert told == ([kind] if possible else [])


@pytest.mark.parametrize(
    ("family", "overrides", "shape", "told"),
    [
        ("qwen3", {"tie_word_embeddings": False}, "non-uniform", []),
        ("qwen3", {"tie_word_embeddings": False}, "uniform", ["q8_0"]),
        ("qwen3", {"tie_word_embeddings": True}, "non-uniform", ["f16"]),
        ("qwen3", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}, "uniform", []),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "whole", []),  # llama.cpp's qwen2 reads no factors
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "uniform", ["q8_0"]),  # of fewer heads: deci does
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "non-uniform", ["f16"]),
        ("llama", {"rope_parameters": LLAMA3_ROPE}, "uniform", ["q8_0"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "uniform", []),
        ("llama", {"hidden_act": "gelu"}, "uniform", []),
    ],
)
def test_a_card_advises_a_gguf_file_by_the_check_of_the_export(tmp_path, family, overrides, shape, told) -> None:
    model = tiny_model(
        family, torch.float32, **{"attention_bias": False} | overrides if family == "qwen3" else overrides
    )
    saap.save(model if shape == "whole" else saap.compact(model, make_plan(model, shape)), tmp_path / "m")
    assert [kind for kind in TYPES if GGUF + kind in card(tmp_path / "m").text] == told
    if told:
        assert export_gguf(tmp_path / "m", tmp_path / "m.gguf", type=told[0], tell=list).is_file()
    else:
        with pytest.raises(ValueError):
            export_gguf(tmp_path / "m", tmp_path / "m.gguf", type="f16", tell=list)


def test_base_model_data_and_perplexities_are_metadata(tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    evaluation = saap.evaluate(model, None, ids, seq_len=16)
    made = Made("org/llama-1", "hub:org/texts:en", "8 sequences", "saap prune org/llama-1", evaluation, "hub:org/held")
    saap.save(model, tmp_path / "m", made=made)
    found = card(tmp_path / "m")
    assert found.data.base_model == "org/llama-1" and found.data.datasets == ["org/texts"]
    (result,) = found.data.eval_results
    assert (result.dataset_type, result.metric_type) == ("org/held", "perplexity")
    assert result.metric_value == pytest.approx(evaluation.perplexity, abs=1e-4)  # four decimals
    assert f"| pruned | {evaluation.perplexity:.2f} |" in found.text and "saap prune org/llama-1" in found.text


def test_a_model_by_its_hub_name_is_the_base_model_and_a_path_is_not(tmp_path, monkeypatch) -> None:
    model = tiny_model("llama", torch.float32)
    model.name_or_path = "org/llama-1"
    saap.save(saap.compact(model, make_plan(model)), tmp_path / "a")
    assert card(tmp_path / "a").data.base_model == "org/llama-1"
    again = saap.load(tmp_path / "a")
    saap.save(again, tmp_path / "b")
    assert card(tmp_path / "b").data.base_model is None and str(tmp_path) not in card(tmp_path / "b").content
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/llama-1").mkdir(parents=True)
    assert [hub_name(name) for name in ("org/llama-1", "./m", "../m", "/m/x", "a/b/c", "m", "")] == [None] * 7
    assert [told_name(name) for name in ("/secret/m.txt", "hub:a/b:c", "x/y", "a/b/c")] == [
        "m.txt",
        "hub:a/b:c",
        "x/y",
        "c",
    ]


def test_the_command_tells_what_it_was_given_without_its_paths(workplace, tmp_path) -> None:  # noqa: F811
    folder, text = workplace / "dense", workplace / "text.txt"
    data = ["--data", text, "--samples", "4", "--seq-len", "16", "--eval", text, "--multiple", "8"]
    run("prune", folder, *data, "--ratio", "0.2", "--out", tmp_path / "out", "--uniform", "--json")
    found = card(tmp_path / "out")
    told = (
        "saap prune dense --data text.txt --ratio 0.2 --eval text.txt --multiple 8 --uniform --samples 4 --seq-len 16"
    )
    assert f"```\n{told}\n```" in found.text
    assert "| measured on | 4 sequences, 64 tokens |" in found.text and "| calibration text | text.txt |" in found.text
    rows = [line for line in found.text.splitlines() if line.startswith(("| dense | ", "| pruned | "))]
    assert len(rows) == 2
    (result,) = found.data.eval_results
    assert result.dataset_name == "text.txt" and f"| pruned | {result.metric_value:.2f} |" in rows[1]
    for path in (workplace, tmp_path):
        assert str(path) not in found.content
    plan = json.loads((tmp_path / "out/saap_plan.json").read_text())
    assert f"ratio {plan['settings']['ratio']}" in found.text
