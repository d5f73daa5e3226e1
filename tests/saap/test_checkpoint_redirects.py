"""Directories whose configuration sends a reader elsewhere, or describes less than the files hold."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import saap
from saap.checkpoint_files import check_directory, weight_files
from saap.model_info import model_info
from tests.saap.tiny import tiny_model


def edited(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.fixture
def folder(tmp_path):
    saap.save(tiny_model("llama"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["x.safetensors.index.json", "adapter_model.bin", "../model.safetensors"])
def test_weights_by_another_name_are_refused(folder, name) -> None:
    for read in (saap.load, model_info):
        with pytest.raises(ValueError, match="transformers_weights names other weight files"):
            read(edited(folder, transformers_weights=name))


def test_files_with_more_layers_than_the_configuration_are_refused(folder) -> None:
    with pytest.raises(ValueError, match=r"no place for model\.layers\.1\."):
        saap.load(edited(folder, num_hidden_layers=1))


def test_what_a_stock_model_has_no_use_for_may_be_there(folder) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"extra.buffer": tensors["model.norm.weight"].clone()}, file, {"format": "pt"})
    saap.load(folder)


@pytest.mark.parametrize("values", [{"num_attention_heads": 0}, {"hidden_size": "abc"}, {"dtype": "foo"}])
def test_configurations_that_cannot_be_read_are_told_in_a_line(folder, values) -> None:
    with pytest.raises(ValueError, match=r"config\.json is not a configuration that transformers can read"):
        check_directory(edited(folder, **values))


def test_the_single_file_counts_where_an_index_is_there_too(folder) -> None:
    other = folder / "other.safetensors"
    save_file({"a": torch.zeros(3)}, other, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert weight_files(folder) == [folder / "model.safetensors"]
    saap.load(folder)
    (folder / "model.safetensors").unlink()
    assert weight_files(folder) == [other]
