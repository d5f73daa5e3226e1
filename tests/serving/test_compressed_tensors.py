"""``saap export --compressed-tensors int4``: what is written, what transformers and saap make of it, what is refused.

vLLM's CPU kernel for these weights needs AVX-512, and Marlin a GPU: here its rules are checked, and it does not run.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import saap
from saap.compact import compact
from saap.data import load_documents
from saap.evaluate import perplexity
from saap.model_info import model_info
from saap.opening import open_tokenizer
from saap.plan import LayerPlan, Plan
from saap.quantise import export_quantised
from saap.serving.compressed_tensors import export_compressed_tensors
from saap.units import discover
from tests.saap.command_line import run
from tests.saap.tiny import DENSE, tiny_model, tiny_tokenizer
from tests.serving.test_quantiser import IDS

GROUP = 32
SMALL_MODEL = Path(__file__).parents[2] / "benchmarks/small_model"


def aligned(family: str, dtype: torch.dtype = torch.float32):
    """A model whose every in_features is a multiple of 32."""
    sizes = {"opt": {"ffn_dim": 96}, "qwen2": {"intermediate_size": 96}, "phi3": {"intermediate_size": 96}}
    return tiny_model(family, dtype, **sizes.get(family, {"head_dim": 16, "intermediate_size": 96}))


def unequal(family: str, empty: bool = False):
    """The same, cut to layers of several sizes, all of them multiples of 32; ``empty``: nothing is left of one."""
    model = aligned(family)
    units = discover(model)
    heads = units.layers[0].kv_heads
    sizes = ((heads // 2, 96), (heads, 64), (0, 0) if empty else (heads, 32))
    layers = tuple(LayerPlan(tuple(range(kv)), tuple(range(width))) for kv, width in sizes)
    compact(model, Plan(units, layers, {"made": "by hand", "allow_empty": empty}))
    return model


def as_stored(model, folder: Path) -> float:
    """Give ``model`` the weights that the files say, by the format's definition; the largest change in steps."""
    tensors, worst = load_file(folder / "model.safetensors"), 0.0
    for name, module in model.named_modules():
        packed = tensors.get(f"{name}.weight_packed")
        if packed is not None:
            quantised = torch.stack([(packed >> 4 * i) & 15 for i in range(8)], -1).flatten(1) - 8  # low bits first
            scale = tensors[f"{name}.weight_scale"].repeat_interleave(GROUP, 1)
            assert tensors[f"{name}.weight_shape"].tolist() == list(module.weight.shape)
            worst = max(worst, ((quantised * scale - module.weight) / scale).abs().max().item())
            module.weight.data = quantised * scale
    return worst


@pytest.mark.parametrize("make", [aligned, unequal])
@pytest.mark.parametrize("family", DENSE)
def test_logits_are_those_of_the_rounded_weights(family: str, make, tmp_path) -> None:
    model = make(family)
    saap.save(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    export_compressed_tensors(tmp_path / "model", tmp_path / "int4")
    loaded, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "int4", output_loading_info=True, attn_implementation=model.config._attn_implementation
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert type(loaded) is type(saap.load(tmp_path / "model"))
    assert 0.4 < as_stored(model, tmp_path / "int4") < 0.5 + 1e-5  # the nearest step, up to fp32's rounding
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    plain = saap.load(tmp_path / "int4")
    assert torch.equal(plain(IDS).logits, loaded(IDS).logits)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert getattr(plain.config, "quantization_config", None) is None and saap.discover(plain).layers


def test_files_are_what_vllm_reads(tmp_path) -> None:
    saap.save(aligned("llama", torch.bfloat16), tmp_path / "model")
    export_compressed_tensors(tmp_path / "model", tmp_path / "int4")
    described = json.loads((tmp_path / "int4/config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["format"]) == ("compressed-tensors", "pack-quantized")
    assert described["quantization_status"] == "compressed" and described["ignore"] == ["lm_head"]
    (group,) = described["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    assert {key: group["weights"].get(key) for key in wanted} == wanted
    name, tensors = "model.layers.0.mlp.down_proj", load_file(tmp_path / "int4/model.safetensors")
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items() if key.startswith(name)} == {
        f"{name}.weight_packed": ((64, 96 // 8), torch.int32),
        f"{name}.weight_scale": ((64, 96 // 32), torch.bfloat16),
        f"{name}.weight_shape": ((2,), torch.int64),
        f"{name}.bias": ((64,), torch.bfloat16),
    }


def test_modules_without_anything_left_are_ignored_by_name(tmp_path) -> None:
    model = unequal("llama", empty=True)
    empty = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and 0 in m.weight.shape}
    saap.save(model, tmp_path / "model")
    export_compressed_tensors(tmp_path / "model", tmp_path / "int4")
    described = json.loads((tmp_path / "int4/config.json").read_text())["quantization_config"]
    assert empty and set(described["ignore"]) == empty | {"lm_head"}
    assert torch.isfinite(saap.load(tmp_path / "int4")(IDS).logits).all()


def test_the_command_writes_card_plan_and_tokenizer(tmp_path) -> None:
    saap.save(unequal("llama"), tmp_path / "model", tokenizer=tiny_tokenizer())
    run("export", tmp_path / "model", "--compressed-tensors", "int4", "--out", tmp_path / "int4")
    names = {file.name for file in (tmp_path / "int4").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_saap.py", "saap_plan.json", "tokenizer.json"} <= names
    card = (tmp_path / "int4/README.md").read_text()
    assert "int4 in groups of 32, compressed-tensors pack-quantized" in card
    assert "int4 in groups of 32, compressed-tensors" in run("info", tmp_path / "int4").stdout
    info, dense = model_info(tmp_path / "int4"), model_info(tmp_path / "model")
    assert info.layers == dense.layers and info.weight_bytes < dense.weight_bytes


WITHOUT_SAAP = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(20)[None] % 64).logits, sys.argv[2])
assert "saap" not in sys.modules
"""


def test_a_template_loads_without_saap(tmp_path) -> None:
    saap.save(unequal("llama"), tmp_path / "model")
    export_compressed_tensors(tmp_path / "model", tmp_path / "int4")
    command = [sys.executable, "-c", WITHOUT_SAAP, str(tmp_path / "int4"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), saap.load(tmp_path / "int4")(IDS).logits)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: tiny_model("llama", torch.float32), {},
         "model.layers.0.mlp.down_proj: expected in_features to be a multiple of the group size 32, got 97; prune"),
        (lambda: aligned("llama"), {"group_size": 128}, "self_attn.q_proj: .* multiple of the group size 128, got 64"),
        (lambda: aligned("llama"), {"group_size": 48}, "group_size: expected one of 32, 64, 128, got 48"),
        (lambda: tiny_model("mixtral", torch.float32), {}, "mixtures of experts are not exported as"),
        (lambda: saap.quantise(aligned("llama"), bits=4), {}, "got a model quantised by saap"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(model, options, message: str, tmp_path, monkeypatch) -> None:
    saap.save(model(), tmp_path / "model")
    monkeypatch.setattr("saap.serving.compressed_tensors._compressed_state", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(tmp_path / "model", tmp_path / "int4", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_weights_that_are_not_finite_and_folders_that_are_taken(tmp_path) -> None:
    model = aligned("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="NaN or inf in model.layers.1.mlp.up_proj.weight"):
        export_compressed_tensors(tmp_path / "model", tmp_path / "int4")
    with pytest.raises(FileExistsError, match="exists already"):
        export_compressed_tensors(tmp_path / "model", tmp_path / "model")


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    saap.save(aligned("llama"), tmp_path / "model")
    export_compressed_tensors(tmp_path / "model", tmp_path / "int4")
    for module in ("saap.serving.compressed_tensors", "saap.quantised_config"):
        monkeypatch.setattr(f"{module}.find_spec", lambda _: None)
    for work in (
        lambda: export_compressed_tensors(tmp_path / "model", tmp_path / "other"),
        lambda: saap.load(tmp_path / "int4"),
    ):
        with pytest.raises(RuntimeError, match=r"pip install 'saap\[compressed-tensors\]'"):
            work()


def test_the_trained_model_stays_what_it_was(tmp_path) -> None:
    """1.0245 measured on the 20,480 tokens of the report text, 1.018 on the Qwen2."""
    export_compressed_tensors(SMALL_MODEL, tmp_path / "int4")
    tokenizer, documents = open_tokenizer(str(SMALL_MODEL)), load_documents(str(SMALL_MODEL / "selection.jsonl"))[:20]
    plain, found = (perplexity(saap.load(each), tokenizer, documents) for each in (SMALL_MODEL, tmp_path / "int4"))
    assert found < 1.04 * plain


def test_what_is_loaded_is_a_plain_model_that_can_be_quantised_anew(tmp_path) -> None:
    saap.save(unequal("llama"), tmp_path / "model")
    export_compressed_tensors(tmp_path / "model", tmp_path / "int4")
    model = saap.load(tmp_path / "int4")
    ids = torch.arange(8)[None]
    want = model(ids).logits
    assert all(type(vars(module)["_parameters"]) is dict for module in model.modules())
    found = saap.quantise(model, bits=8)(ids).logits
    assert not torch.equal(found, want) and (found - want).abs().max() < 0.1 * want.abs().max()  # 8 bits of 4


@pytest.mark.parametrize("export", [export_compressed_tensors, partial(export_quantised, bits=8)])
def test_a_model_is_not_written_over_itself(tmp_path, export) -> None:
    saap.save(unequal("llama"), tmp_path / "model")
    with pytest.raises(ValueError, match="is the model itself"):
        export(tmp_path / "model", tmp_path / "model/../model", force=True)
    saap.load(tmp_path / "model")
