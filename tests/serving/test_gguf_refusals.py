"""What no GGUF file is made of: refused by name before any work, and nothing is left behind."""

import builtins
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saap
from saap.serving.gguf_export import export_gguf
from tests.saap.tiny import tiny_model
from tests.serving.gguf_models import DIFFERENT, LLAMA3_ROPE, UNIFORM, saved

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")


def refused(folder: Path, kind: str = "f16", error: type[Exception] = ValueError) -> str:
    """The message; a file or a folder that it leaves is a failure."""
    target = folder.parent / "written" / "x.gguf"
    with pytest.raises(error) as caught:
        export_gguf(folder, target, kind)
    assert not target.parent.exists() or os.listdir(target.parent) == []
    return str(caught.value)


def edited(folder: Path, **values) -> Path:
    """The directory with other values in config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize("family", ["opt", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_other_families(tmp_path, family) -> None:
    saap.save(tiny_model(family, torch.float32), tmp_path / "model")
    message = refused(tmp_path / "model")
    assert repr(family) in message and "Llama, Mistral, Qwen2" in message


def test_qwen3_of_different_layers_without_tied_embeddings(tmp_path) -> None:
    assert "not tied" in refused(saved(tmp_path / "model", "qwen3", DIFFERENT, tie_word_embeddings=False))


def test_qwen3_with_biases(tmp_path) -> None:
    message = refused(saved(tmp_path / "model", "qwen3", UNIFORM, attention_bias=True))
    assert "layer 0" in message and "bias in q, k, v, o" in message


@pytest.mark.parametrize(
    "kept, what", [(((4, 128), (0, 128), (4, 128)), "heads"), (((4, 128), (4, 0), (4, 128)), "MLP")]
)
def test_layers_without_heads_or_channels(tmp_path, kept, what) -> None:
    message = refused(saved(tmp_path / "model", "llama", kept))
    assert "layer 1" in message and what in message and "--allow-empty" in message


def test_widths_that_are_no_whole_blocks(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama", ((4, 128), (4, 128), (4, 99)))
    message = refused(folder, "q8_0")
    assert "layer 2: down_proj has 99" in message and "--multiple 32" in message and "--for llama.cpp" in message
    assert export_gguf(folder, tmp_path / "x.gguf", "f16").is_file()


def test_heads_that_are_no_whole_blocks(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama", ((4, 128), (1, 128), (4, 128)), head_dim=8)
    assert "layer 1: o_proj has 16 (inputs of its 2 heads of 8)" in refused(folder, "q4_0")
    assert export_gguf(folder, tmp_path / "x.gguf", "f32").is_file()


def test_a_hidden_size_that_is_no_whole_blocks(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama", hidden_size=80)
    assert "hidden_size is 80" in refused(folder, "q8_0")
    assert export_gguf(folder, tmp_path / "x.gguf", "bf16").is_file()


@pytest.mark.parametrize("kind", ["q3_k_m", "Q4_K", "iq4_xs", "int8", ""])
def test_types_that_cannot_be_written(tmp_path, kind) -> None:
    message = refused(tmp_path, kind)
    assert "f32, f16, bf16, q8_0" in message and ("llama-quantize" in message) is (kind not in ("int8", ""))


@pytest.mark.parametrize(
    "rope, told",
    [
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "'yarn'"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "'dynamic'"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_rotary_embeddings_that_are_not_written(tmp_path, rope, told) -> None:
    assert told in refused(edited(saved(tmp_path / "model", "llama"), rope_parameters=rope))


def test_llama_3s_rotary_embedding_where_no_factors_are_read(tmp_path) -> None:
    assert "qwen3 has no rotary" in refused(saved(tmp_path / "model", "qwen3", rope_parameters=LLAMA3_ROPE))


def test_another_activation(tmp_path) -> None:
    assert "'gelu'" in refused(edited(saved(tmp_path / "model", "llama"), hidden_act="gelu"))


def test_quantised_directories(tmp_path) -> None:
    folder = edited(saved(tmp_path / "model", "llama"), quantization_config={"quant_method": "saap", "bits": 8})
    message = refused(folder)
    assert "quantised weights (saap)" in message and "--type q8_0" in message


def test_values_beyond_fp16_and_no_numbers(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = 7e4
    save_file(tensors, file, {"format": "pt"})
    assert name in refused(folder, "f16") and "bf16" in refused(folder, "q8_0")
    assert export_gguf(folder, tmp_path / "x.gguf", "bf16").is_file()
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    assert name in refused(folder, "f32")


def test_missing_unknown_and_integer_tensors(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    whole = load_file(file)
    save_file({k: t for k, t in whole.items() if "layers.2.mlp.down_proj.weight" not in k}, file, {"format": "pt"})
    assert "model.layers.2.mlp.down_proj.weight" in refused(folder)
    save_file(whole | {"model.layers.0.mlp.extra.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    assert "model.layers.0.mlp.extra.weight" in refused(folder)
    save_file(whole | {"model.norm.weight": torch.ones(256, dtype=torch.int8)}, file, {"format": "pt"})
    assert "model.norm.weight" in refused(folder) and "I8" in refused(folder)
    save_file(whole | {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 256)}, file, {"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in refused(folder)


def test_damaged_directories(tmp_path) -> None:
    assert "found none at" in refused(tmp_path / "nothing", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty", error=FileNotFoundError)
    folder = saved(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "not a complete safetensors file" in refused(folder)
    file.unlink()
    assert "found none" in refused(folder, error=FileNotFoundError)
    file.write_bytes(content)
    (folder / "config.json").write_text("{")
    assert "config.json is not a configuration" in refused(folder)


def test_an_index_that_leaves_its_directory(tmp_path) -> None:
    folder = saved(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "expected names of safetensors files in" in refused(folder)


def test_targets_that_are_in_the_way(tmp_path, monkeypatch) -> None:
    folder, target = saved(tmp_path / "model", "llama"), tmp_path / "x.gguf"
    with pytest.raises(FileExistsError, match="is a directory"):
        export_gguf(folder, tmp_path, "f16", force=True)
    target.write_bytes(b"before")
    with pytest.raises(FileExistsError, match="--force"):
        export_gguf(folder, target, "f16")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="MiB left"):
        export_gguf(folder, target, "f16", force=True)
    assert target.read_bytes() == b"before" and sorted(os.listdir(tmp_path)) == ["model", "x.gguf"]


def test_without_the_package_the_message_names_the_extra(tmp_path, monkeypatch) -> None:
    inner = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return inner(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match=r"saap\[gguf\]"):
        export_gguf(tmp_path, tmp_path / "x.gguf", "f16")


def test_a_head_that_is_not_the_embeddings_it_is_said_to_share(tmp_path) -> None:
    """transformers keeps both; a file of tied embeddings has no place for the head."""
    folder = saved(tmp_path, "qwen2", UNIFORM, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embeddings = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embeddings.clone()}, file, {"format": "pt"})
    export_gguf(folder, tmp_path / "same.gguf", "f32")
    save_file(tensors | {"lm_head.weight": embeddings + 1}, file, {"format": "pt"})
    assert "lm_head.weight differs from the embeddings" in refused(folder)
