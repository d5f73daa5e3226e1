"""Directories that are not what they say, or that point elsewhere: refused by name, before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import saap
from saap.checkpoint_files import within
from saap.cli import app
from saap.model_info import model_info
from tests.saap.test_checkpoint import ids, make_plan
from tests.saap.tiny import FAMILIES, tiny_model, tiny_tokenizer


def saved(folder: Path, family: str = "llama", shape: str = "non-uniform", **options) -> Path:
    model = tiny_model(family, torch.float32)
    pruned = saap.compact(model, make_plan(model, shape))
    saap.save(pruned, folder, tokenizer=tiny_tokenizer(), **options)
    return folder


def edited(file: Path, change) -> None:
    """``change`` applied to the object in a JSON file."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def refused(folder: Path, error: type[Exception], message: str) -> None:
    """Loading, describing and serving a directory end with one message."""
    for use in (saap.load, model_info):
        with pytest.raises(error, match=message):
            use(folder)
    pytest.importorskip("uvicorn", reason="serving needs saap[serve]")
    done = CliRunner().invoke(app, ["serve", str(folder), "--port", "0"])
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["parent", "absolute", "deep", "windows"])
def test_an_index_cannot_name_files_outside_of_the_directory(tmp_path, kind: str) -> None:
    folder = saved(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")  # whole, so that only its place is wrong
    name = {
        "parent": "../x.safetensors",
        "absolute": str(tmp_path / "x.safetensors"),
        "deep": "sub/../../x.safetensors",
        "windows": "..\\x.safetensors",
    }[kind]
    tensors = load_file(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    refused(folder, ValueError, "expected names of safetensors files in .*, got ")


def test_names_within_a_directory() -> None:
    assert all(map(within, ("a.safetensors", "sub/a.safetensors", "..a.safetensors")))
    assert not any(map(within, ("/a", "../a", "a/..", "C:\\a", "C:a", "\\\\host\\a", "a\\..\\b")))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_are_not_opened(tmp_path, monkeypatch, name: str) -> None:
    folder = saved(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    refused(folder, ValueError, f"found {name}: pickled files are not opened")


def test_an_index_cannot_name_pickled_weights(tmp_path, monkeypatch) -> None:
    folder = saved(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    names = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    refused(folder, ValueError, "expected names of safetensors files in .*, got 'pytorch_model.bin'")


def test_saap_runs_no_code_of_a_checkpoint(tmp_path) -> None:
    folder, trace = saved(tmp_path / "m"), tmp_path / "ran"
    want = saap.load(folder)(ids()).logits
    for name in ("configuration_saap.py", "modeling_saap.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w')\n")
    edited(folder / "tokenizer_config.json", lambda v: v.update(auto_map={"AutoTokenizer": ["modeling_saap.T", None]}))
    assert torch.equal(saap.load(folder)(ids()).logits, want) and model_info(folder).layout == "template"
    from saap.opening import open_tokenizer

    assert open_tokenizer(str(folder)) is not None and not trace.exists()


@pytest.mark.parametrize("name", ["org/repo--modeling_saap.X", "../modeling_saap.X", "sub/modeling_saap.X", "X"])
def test_code_outside_of_a_pruned_checkpoint_is_refused(tmp_path, name: str) -> None:
    folder = saved(tmp_path / "m")
    edited(folder / "config.json", lambda values: values["auto_map"].update(AutoModel=name))
    refused(folder, ValueError, "auto_map AutoModel names code outside of the directory")


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_of_another_pruning_is_told(tmp_path, family: str, shape: str) -> None:
    folder = saved(tmp_path / "m", family, shape)
    model_info(folder)
    other = "uniform" if shape == "non-uniform" else "non-uniform"
    saved(tmp_path / "other", family, other)
    (folder / "saap_plan.json").write_bytes((tmp_path / "other/saap_plan.json").read_bytes())
    refused(folder, ValueError, "saap_plan.json is not of this model: kv_heads of layer 0 is ")


def test_a_plan_of_another_family_or_depth_or_that_is_none_is_told(tmp_path) -> None:
    folder = saved(tmp_path / "m")
    saap.save(tiny_model("llama", torch.float32, num_hidden_layers=2), tmp_path / "short")
    (tmp_path / "short/saap_plan.json").write_bytes((folder / "saap_plan.json").read_bytes())
    refused(tmp_path / "short", ValueError, "is a plan for 3 layers, but the model has 2")
    (folder / "saap_plan.json").write_text("{}")
    refused(folder, ValueError, "lacks or misshapes the field 'format'")
    (folder / "saap_plan.json").write_text('{"format": 1')
    refused(folder, ValueError, "saap_plan.json is not valid JSON")


@pytest.mark.parametrize(
    ("family", "name", "value", "tensor"),
    [
        ("llama", "num_key_value_heads", 1, "model.layers.0.self_attn.k_proj.bias"),
        ("qwen2", "intermediate_size", 33, "model.layers.0.mlp.down_proj.weight"),
        ("phi3", "intermediate_size", 33, "model.layers.0.mlp.down_proj.weight"),
        ("opt", "ffn_dim", 33, "model.decoder.layers.0.fc1.bias"),
        ("mixtral", "intermediate_size", 8, "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_sizes_that_are_not_those_of_the_weights_are_told_by_tensor(
    tmp_path, family: str, name: str, value: int, tensor: str
) -> None:
    folder = saved(tmp_path / "m", family)
    (folder / "saap_plan.json").unlink()  # which would tell first
    first = sorted(json.loads((folder / "config.json").read_text())["per_layer_config"])[0]
    edited(folder / "config.json", lambda values: values["per_layer_config"][first].update({name: value}))
    with pytest.raises(ValueError, match=f"the configuration wants {tensor} of shape .*, the file has"):
        saap.load(folder)
    with pytest.raises(ValueError, match=r"expected .* of shape|weights of experts"):
        model_info(folder)


def test_tensors_that_are_missing_or_have_no_place_are_told(tmp_path) -> None:
    folder = saved(tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"expected {name} of shape \[\d+, 64\], found none"):
        model_info(folder)
    with pytest.raises(ValueError, match=f"the weights lack {name}, which the configuration wants"):
        saap.load(folder)
    save_file(tensors | {"model.layers.3.mlp.up_proj.weight": tensors[name].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no place for model.layers.3.mlp.up_proj.weight of the weights"):
        saap.load(folder)
