"""The vLLM plugin without vLLM: its entry point, what it registers, and what it refuses before anything is loaded.

A few modules stand in for vLLM (conftest.py); ``make test-vllm`` runs the real ones.
"""

import logging
import subprocess
import sys
import types
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import saap
from saap.serving import vllm_plugin
from saap.serving.vllm_rules import StoredFormat, check_files, check_served
from tests.saap.test_empty_modules import hollow
from tests.serving.checkpoints import EVEN, mixture_checkpoint, tiny_checkpoint
from tests.serving.vllm_stand import Stand

ROOT = Path(__file__).parents[2]
DENSE = ("Gemma2", "Llama", "Mistral", "OPT", "Phi3", "Qwen2", "Qwen3")
MIXTURES = ("Mixtral", "Qwen3Moe")
FULL_NAME = "model.layers.1.mlp.down_proj"


def quantisation(vllm: Stand, bits: int, group_size: int, kept=()):
    """The configuration that vLLM makes of a checkpoint's."""
    vllm_plugin.register()
    given = {"version": 1, "bits": bits, "group_size": group_size, "modules_to_not_convert": list(kept)}
    return vllm.methods["saap"].from_config(given)


def test_the_entry_point_is_the_plugins(tmp_path) -> None:
    """Of the metadata that an installation of this tree gets."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (installed,) = distributions(path=[str(tmp_path)])
    (entry,) = installed.entry_points.select(group="vllm.general_plugins")
    assert entry.load() is vllm_plugin.register


def test_importing_the_plugin_needs_no_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None; import saap.serving.vllm_plugin as p; p.register(); print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


def test_register_twice_knows_every_family_and_the_method(vllm) -> None:
    for _ in range(2):
        vllm_plugin.register()
        backend = "vllm.model_executor.models.transformers:Transformers"
        assert vllm.models == {
            **{f"Saap{name}ForCausalLM": f"{backend}ForCausalLM" for name in DENSE},
            **{f"Saap{name}ForCausalLM": f"{backend}MoEForCausalLM" for name in MIXTURES},
        }
        assert vllm.checks.keys() == vllm.models.keys()
        assert vllm.methods["saap"].get_name() == "saap"


def test_register_makes_the_auto_classes_known() -> None:
    code = """
import saap.serving.vllm_plugin
from transformers import AutoConfig
print(type(AutoConfig.for_model("saap_qwen3")).__name__)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "SaapQwen3Config\n", done.stderr


def test_an_older_vllm_is_told_and_serves_on(vllm, monkeypatch, caplog) -> None:
    monkeypatch.delattr(sys.modules["vllm.config.model_arch"].ModelArchitectureConfig, "per_layer_overrides")
    sys.modules["vllm"].__version__ = "0.27.0"
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
    assert "need vLLM >= 0.28, this is 0.27.0" in caplog.text
    assert not vllm.models and "saap" in vllm.methods  # quantised stock models need no sizes by layer


def test_a_vllm_without_the_names_is_told_and_serves_on(vllm, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", None)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
    assert caplog.text.count("need vLLM >= 0.28") == 2 and not vllm.models and not vllm.methods


def served(vllm: Stand, folder, devices: int) -> None:
    """vLLM's check of one model, which it makes before it starts anything."""
    vllm_plugin.register()
    config = AutoConfig.from_pretrained(folder)
    check = vllm.checks[config.architectures[0]]
    model = types.SimpleNamespace(hf_config=config, model=str(folder))
    parallel = types.SimpleNamespace(tensor_parallel_size=devices)
    check.verify_and_update_config(types.SimpleNamespace(model_config=model, parallel_config=parallel))


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_devices_that_cannot_share_a_layer_are_refused_by_name(vllm, tmp_path, family) -> None:
    folder = tiny_checkpoint(tmp_path / family, family)
    served(vllm, folder, 1)
    with pytest.raises(ValueError, match="layer 0: tensor_parallel=2 cannot split"):
        served(vllm, folder, 2)


def test_devices_that_can_share_every_layer_pass(vllm, tmp_path) -> None:
    folder = tiny_checkpoint(tmp_path / "even", "llama", EVEN, intermediate_size=128)
    served(vllm, folder, 2)
    with pytest.raises(ValueError, match="layer 1: tensor_parallel=4 cannot split 1 KV heads with 2 query heads"):
        served(vllm, folder, 4)


def test_layers_without_a_module_are_refused_by_name(tmp_path) -> None:
    model = hollow("llama", torch.float32)
    saap.save(model, tmp_path / "hollow")
    config = AutoConfig.from_pretrained(tmp_path / "hollow")
    with pytest.raises(ValueError, match="layer 1 has no MLP, which vLLM cannot run"):
        check_served(config, 1)
    config.per_layer_config = {2: {"num_attention_heads": 0, "num_key_value_heads": 0}}
    with pytest.raises(ValueError, match="layer 2 has no attention, which vLLM cannot run"):
        check_served(config, 1)


def test_mixtures_may_differ_in_heads_but_not_in_experts(vllm, tmp_path) -> None:
    same = mixture_checkpoint(tmp_path / "same", "qwen3_moe")
    served(vllm, same, 1)
    # what vLLM reads outside of the layers
    assert AutoConfig.from_pretrained(same).moe_intermediate_size == 16
    other = mixture_checkpoint(tmp_path / "other", "mixtral", widths=(16, 16, 8))
    with pytest.raises(ValueError, match="layer 2 has 3 experts of width 8, layer 0 3 of 16"):
        served(vllm, other, 1)


def test_a_truncated_file_is_refused_by_name(vllm, tmp_path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    check_files(str(folder))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        served(vllm, folder, 1)
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        quantisation(vllm, 4, 32).maybe_update_config(str(folder), hf_config=None)
    check_files("a-name/on-the-hub")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected version 1, got 2"),
        ({"version": None}, "expected version 1, got None"),
        ({"version": True}, "expected version 1, got True"),
        ({"bits": 3}, "expected bits 4 or 8, got 3"),
        ({"bits": "4"}, "expected bits 4 or 8, got '4'"),
        ({"group_size": 48}, "expected group_size 32 or 64 or 128, got 48"),
        ({"modules_to_not_convert": "lm_head"}, "expected modules_to_not_convert to be a list of names, got 'lm_head'"),
        ({"modules_to_not_convert": [1]}, r"list of names, got \[1\]"),
    ],
)
def test_formats_of_others_are_refused_by_key(change, message) -> None:
    given = {"version": 1, "bits": 4, "group_size": 32, "modules_to_not_convert": ["lm_head"]}
    assert StoredFormat.read(given) == StoredFormat(4, 32, ("lm_head",))
    with pytest.raises(ValueError, match=message):
        StoredFormat.read(given | change)


def test_what_is_quantised_goes_by_the_ends_of_names(vllm) -> None:
    config = quantisation(
        vllm, 4, 32, ["lm_head", "mlp.gate", "k_proj", "q_proj", "v_proj", "model.layers.1.mlp.down_proj"]
    )
    config.packed_modules_mapping.update(qkv_proj=["q_proj", "k_proj", "v_proj"], gate_up_proj=["gate_proj", "up_proj"])
    stored, mapping = config.stored, config.packed_modules_mapping
    expected = {
        "model.layers.0.self_attn.qkv_proj": False,  # each of them by its last component
        "model.layers.0.self_attn.o_proj": True,
        "model.layers.0.mlp.gate": False,
        "model.layers.0.mlp.gate_up_proj": True,
        "model.layers.0.mlp.down_proj": True,
        FULL_NAME: False,
        "lm_head": False,
        "model.project_out": False,  # outside of the layers nothing is stored quantised
    }
    assert {name: stored.quantises(name, mapping) for name in expected} == expected
    with pytest.raises(ValueError, match="leaves up_proj of model.layers.0.mlp as they were, .* gate_proj, up_proj as"):
        StoredFormat(4, 32, ("up_proj",)).quantises("model.layers.0.mlp.gate_up_proj", mapping)
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
