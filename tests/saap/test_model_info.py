"""``saap info``: what a directory holds, without its weights; and what is no model directory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import saap
from saap.compact import compact
from saap.cost import cost_of
from saap.model_info import model_info
from tests.saap.command_line import run
from tests.saap.test_checkpoint import FAMILIES, make_plan
from tests.saap.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", ["dense", "uniform", "non-uniform"])
def test_info_equals_the_loaded_model(tmp_path, family: str, shape: str, tied: bool) -> None:
    model = tiny_model(family, torch.bfloat16, tie_word_embeddings=tied)
    if shape != "dense":
        compact(model, make_plan(model, shape))
    saap.save(model, tmp_path / "m", tokenizer=tiny_tokenizer())
    found, units, cost = model_info(tmp_path / "m"), saap.discover(model), cost_of(model, 0)
    assert found.layers == units.layers and found.block_parameters == units.block_parameters
    assert found.parameters == units.total_parameters == sum(found.stored.values())
    assert found.kv_cache_bytes_per_token == cost.kv_cache_bytes_per_token
    assert found.stored.keys() == {"BF16"} and found.dtypes == "BF16" and found.tokenizer
    stock = shape == "dense" or (shape == "uniform" and family != "opt")
    assert found.layout == ("stock" if stock else "template") and found.uniform is (shape != "non-uniform")
    assert found.weight_bytes == (tmp_path / "m/model.safetensors").stat().st_size < found.disk_bytes
    assert (found.plan is None) is (shape == "dense")
    assert found.written_by.startswith("transformers" if shape == "dense" else "saap ")


def test_no_weight_is_loaded(tmp_path, monkeypatch) -> None:
    saap.save(tiny_model("llama", torch.float32), tmp_path / "m")
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert not model_info(tmp_path / "m").tokenizer


def test_sharded_weights_are_all_read_and_a_missing_shard_is_named(tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    found = model_info(tmp_path / "m")
    assert found.weight_files > 1 and sum(found.stored.values()) == found.parameters
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is not in"):
        model_info(tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an index of safetensors files"):
        model_info(tmp_path / "m")


def test_the_command_tells_people_and_programs(tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    saap.save(compact(model, make_plan(model)), tmp_path / "m", tokenizer=tiny_tokenizer())
    text = run("info", tmp_path / "m").stdout
    assert "tensor parallel: 1\n" in text  # one layer has an odd number of KV heads
    for piece in ("llama (SaapLlamaForCausalLM, template layout)", "F32", "8 + 4 of 8", "removed: ", "made by hand"):
        assert piece in text
    found = json.loads(run("info", tmp_path / "m", "--json").stdout)
    assert [layer["kv_heads"] for layer in found["layers"]] == [3, 1, 4]
    assert found["plan"]["settings"] == {"made": "by hand"} and found["uniform"] is False
    assert found["tensor_parallel"] == [1]


def test_what_is_no_model_directory_is_named(tmp_path) -> None:
    def message(path) -> str:
        stderr = run("info", path, code=2).stderr
        assert "Traceback" not in stderr
        return " ".join(stderr.split())

    assert "expected a local model directory, found none at absent" in message("./absent")
    assert "expected a model directory with config.json, found none in" in message(tmp_path)
    saap.save(tiny_model("llama", torch.float32), tmp_path / "m")
    weights, config = tmp_path / "m/model.safetensors", tmp_path / "m/config.json"
    tensors = load_file(weights)
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, weights)
    assert "expected model.norm.weight of shape [64], got [3]" in message(tmp_path / "m")
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "model.safetensors is not a complete safetensors file" in message(tmp_path / "m")
    weights.unlink()
    assert "expected .safetensors weights in" in message(tmp_path / "m")
    save_file(tensors, weights)
    config.write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 8, "vocab_size": 64}))
    assert "unknown model family 'gpt2'; known: " in message(tmp_path / "m")
    config.write_text(json.dumps({"model_type": "no-such-model"}))
    assert "no-such-model" in message(tmp_path / "m")
    config.write_text("{")
    assert "config.json" in message(tmp_path / "m")
