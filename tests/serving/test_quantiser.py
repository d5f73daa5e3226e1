"""transformers' plugin: quantised checkpoints load, save and load again, and others are quantised while they load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import saap
from saap.compact import compact
from saap.quantised_linear import QuantisedLinear
from tests.saap.test_checkpoint import make_plan
from tests.saap.test_empty_modules import hollow
from tests.saap.tiny import FAMILIES, MIXTURES, tiny_model, tiny_tokenizer

IDS = torch.arange(20)[None] % 64


def quantised_names(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def assert_same_state(left, right) -> None:
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def pruned(family: str):
    model = tiny_model(family, torch.float32)
    compact(model, make_plan(model))
    return model


@pytest.mark.parametrize("make", [lambda family: tiny_model(family, torch.float32), pruned])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_saves_and_loads_again(family: str, bits: int, make, tmp_path) -> None:
    model = saap.quantise(make(family), bits=bits)
    logits = model(IDS).logits
    saap.save(model, tmp_path / "first")
    described = json.loads((tmp_path / "first/config.json").read_text())["quantization_config"]
    assert {key: described[key] for key in ("quant_method", "version", "bits", "group_size")} == {
        "quant_method": "saap", "version": 1, "bits": bits, "group_size": 32,
    }  # fmt: skip
    loaded = saap.load(tmp_path / "first")
    assert type(loaded) is type(model) and torch.equal(loaded(IDS).logits, logits)
    loaded.save_pretrained(tmp_path / "second", max_shard_size="40KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    again = saap.load(tmp_path / "second")
    assert_same_state(again, model)
    assert torch.equal(again(IDS).logits, logits)
    linears = 4 if family in MIXTURES or family == "phi3" else 6 if family == "opt" else 7
    assert len(quantised_names(again)) == 3 * linears
    assert not any("experts" in name or "lm_head" in name for name in quantised_names(again))


@pytest.mark.parametrize("family", FAMILIES)
def test_others_are_quantised_while_they_load(family: str, tmp_path) -> None:
    model = pruned(family)
    saap.save(model, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", quantization_config=saap.SaapConfig(bits=4))
    assert_same_state(loaded, saap.quantise(model, bits=4))
    loaded.save_pretrained(tmp_path / "quantised")
    assert_same_state(saap.load(tmp_path / "quantised"), loaded)


def test_modules_that_are_left_and_modules_that_are_empty(tmp_path) -> None:
    saap.save(hollow("llama", torch.float32), tmp_path / "hollow")
    config = saap.SaapConfig(
        bits=8, group_size=64, modules_to_not_convert=["down_proj", "model.layers.1.self_attn.q_proj"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hollow", quantization_config=config)
    names = quantised_names(model)
    assert names and not any(name.endswith("down_proj") for name in names)
    assert "model.layers.1.self_attn.q_proj" not in names and "model.layers.1.self_attn.k_proj" in names
    assert all(0 not in model.get_submodule(name).unpacked_weight().shape for name in names)
    model.save_pretrained(tmp_path / "quantised")
    again = saap.load(tmp_path / "quantised")
    assert quantised_names(again) == names and torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_the_model_without_its_head_loads_too(tmp_path) -> None:
    model = saap.quantise(tiny_model("llama", torch.float32), bits=4)
    saap.save(model, tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_scales_follow_the_dtype_that_is_asked_for(tmp_path) -> None:
    saap.save(saap.quantise(tiny_model("llama", torch.bfloat16), bits=4), tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.qscale"].dtype == torch.bfloat16
    loaded = saap.load(tmp_path / "out", dtype=torch.float32)
    up = loaded.model.layers[0].mlp.up_proj
    assert up.qscale.dtype == torch.float32
    assert torch.equal(up.stored()["qscale"].bfloat16(), stored["model.layers.0.mlp.up_proj.qscale"])


def test_generation_is_that_of_the_dequantised_model(tmp_path) -> None:
    saap.save(pruned("qwen2"), tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", quantization_config=saap.SaapConfig(bits=4)
    ).eval()
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    tokens, logits = model.generate(IDS[:, :6], **options), model(IDS).logits
    plain = model.dequantize()
    assert not quantised_names(plain) and getattr(plain.config, "quantization_config", None) is None
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-4, atol=1e-4)  # fp32, other sums
    assert torch.equal(plain.generate(IDS[:, :6], **options), tokens)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(saap.load(tmp_path / "plain")(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits: expected 8 or 4, got 3"),
        ({"bits": "4"}, "bits: expected 8 or 4, got '4'"),
        ({"bits": True}, "bits: expected 8 or 4, got True"),
        ({"group_size": 48}, "group_size: expected one of 32, 64, 128, got 48"),
        ({"version": 2}, "version 2 was written by a newer saap; this one reads up to 1"),
        ({"version": "1"}, "expected version 1 to 1, got '1'"),
        ({"symmetric": True}, "unknown settings for quant_method 'saap': symmetric"),
        ({"modules_to_not_convert": "lm_head"}, "expected a list of names, got 'lm_head'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_code_and_in_files(settings, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        saap.SaapConfig(**settings)
    saap.save(saap.quantise(tiny_model("llama", torch.float32), bits=4), tmp_path / "out")
    edit(tmp_path / "out", settings)
    with pytest.raises(ValueError, match=message):
        saap.load(tmp_path / "out")


def edit(folder: Path, settings: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: edit(d, {"bits": 8}),
            r"layers.0.*qweight: expected shape .* for 8 bits in groups of 32, got .* of U8",
        ),
        (
            lambda d: edit(d, {"group_size": 64}),
            r"layers.0.*qscale: expected shape \(.*, 1\) for 4 bits in groups of 64",
        ),
        (lambda d: edit(d, {"modules_to_not_convert": []}), None),
        (lambda d: edit(d, {"quant_method": "sapp"}), "unknown quant_method 'sapp' in quantization_config"),
        (lambda d: edit(d, {"quant_method": None}), "unknown quant_method None"),
        (lambda d: rewrite(d, lambda t: t.pop(f"{UP}.qzero")), f"the checkpoint has no {UP}.qzero"),
        (lambda d: rewrite(d, lambda t: t[f"{UP}.qscale"].fill_(torch.inf)), f"{UP}.qscale: expected finite values"),
        (
            lambda d: rewrite(d, lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1].clone()})),
            rf"{UP}.qweight",
        ),
        (lambda d: truncate(d / "model.safetensors"), "model.safetensors is not a complete safetensors file"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(damage, message: str | None, tmp_path) -> None:
    saap.save(saap.quantise(tiny_model("llama", torch.float32), bits=4), tmp_path / "out")
    damage(tmp_path / "out")
    if message is None:  # the head is outside of the layers: nothing was said that is not so
        assert saap.load(tmp_path / "out")
        return
    with pytest.raises(ValueError, match=message):
        saap.load(tmp_path / "out")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_weights_that_are_not_finite_are_named_while_they_are_quantised(tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"{UP}.weight: .*expected finite values to quantise to 4 bits"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=saap.SaapConfig(bits=4))


def test_families_that_saap_does_not_know_are_refused_by_name(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="unknown model family 'gpt2'; known: gemma2, llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", quantization_config=saap.SaapConfig(bits=4))


@pytest.mark.parametrize("layout", ["stock", "template"])
def test_lora_learns_beside_quantised_weights(layout: str, tmp_path) -> None:
    model = tiny_model("llama", torch.float32) if layout == "stock" else pruned("llama")
    saap.save(saap.quantise(model, bits=4), tmp_path / "base")
    base = peft.prepare_model_for_kbit_training(saap.load(tmp_path / "base"), use_gradient_checkpointing=False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    optimiser, losses = torch.optim.Adam(trained, lr=0.02), []
    for _ in range(8):
        loss = lora(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]  # 20 tokens by heart
    with pytest.raises(AttributeError):  # peft has no weight to add to, and says so
        lora.merge_adapter()
    lora.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(saap.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(again(input_ids=IDS).logits, lora.eval()(input_ids=IDS).logits, atol=1e-6)
    for name, tensor in lora.unload().state_dict().items():
        assert torch.equal(tensor, before[name]), name


ALONE = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def test_a_template_says_that_it_needs_saap(tmp_path) -> None:
    saap.save(saap.quantise(pruned("llama"), bits=4), tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", ALONE, tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and "holds weights quantised by saap: install saap and import it" in done.stderr


MEASURE = """
import sys, torch, saap
from transformers import AutoModelForCausalLM
from benchmarks.common import anonymous_bytes, peak_memory
options = {"quantization_config": saap.SaapConfig(bits=4)} if "dense" in sys.argv[1] else {}
AutoModelForCausalLM.from_pretrained(sys.argv[2], **options)  # libraries and thread pools
with peak_memory(anonymous_bytes) as peak:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
print(peak() / sum(m.in_features * m.out_features * 4 for m in model.modules() if isinstance(m, torch.nn.Linear)))
"""


def test_loading_takes_less_memory_than_the_dense_weights(tmp_path) -> None:
    sizes = {
        "vocab_size": 512,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_key_value_heads": 8,
        "num_hidden_layers": 8,
    }
    big, small = tiny_model("llama", torch.float32, **sizes), tiny_model("llama", torch.float32, vocab_size=512)
    for name, model in (("big", big), ("small", small)):
        saap.save(model, tmp_path / f"{name}-dense")
        saap.save(saap.quantise(model, bits=4), tmp_path / f"{name}-int4")
    # the packed weights are 0.19; what is freed goes back to the system at once, so that it is not counted
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for kind, most in (("int4", 0.4), ("dense", 0.8)):
        command = [sys.executable, "-c", MEASURE, *(str(tmp_path / f"{name}-{kind}") for name in ("big", "small"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < most, kind


def test_a_tokenizer_goes_along(tmp_path) -> None:
    saap.save(saap.quantise(tiny_model("llama", torch.float32), bits=4), tmp_path / "out", tokenizer=tiny_tokenizer())
    card = (tmp_path / "out/README.md").read_text()
    assert "int4 in groups of 32" in card and "import saap  # needed" in card and "nothing else" not in card
