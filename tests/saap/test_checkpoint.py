"""Compaction and checkpoints: exact removal, bitwise round trips, atomic writes, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

from saap.checkpoint import load, save
from saap.compact import compact
from saap.families import layers_of
from saap.plan import LayerPlan, Plan
from saap.units import Units, discover, unit_masks
from tests.saap.oracle import experts_unreachable
from tests.saap.tiny import FAMILIES, tiny_model, tiny_tokenizer

NON_UNIFORM = (((0, 2, 3), range(0, 90, 2)), ((1,), range(5, 38)), ((0, 1, 2, 3), range(97)))
UNIFORM = (((0, 2), range(0, 64)), ((1, 3), range(33, 97)), ((0, 3), [*range(32), *range(40, 72)]))


def make_plan(model, shape: str = "non-uniform") -> Plan:
    units = discover(model)
    if units.layers[0].experts:
        return mixture_plan(units, shape)
    rows = NON_UNIFORM if shape == "non-uniform" else UNIFORM
    group = units.layers[0].kv_heads // 4  # OPT has 8 KV heads: keep them in pairs
    layers = [
        LayerPlan(tuple(h * group + i for h in heads for i in range(group)), tuple(channels))
        for heads, channels in rows
    ]
    return Plan(units, tuple(layers), {"made": "by hand"})


def mixture_plan(units: Units, shape: str) -> Plan:
    """Every expert keeps channels of its own, and no layer the same ones."""
    heads = [kept for kept, _ in (NON_UNIFORM if shape == "non-uniform" else UNIFORM)]
    sizes = zip(((4, 16), (3, 8), (2, 24)) if shape == "non-uniform" else [(3, 16)] * 3, units.layers, strict=True)
    layers = []
    for index, ((experts, width), layer) in enumerate(sizes):
        full = layer.intermediate_size
        kept = sorted((index + 2 * i + i // 2) % layer.experts for i in range(experts))
        channels = [e * full + c for e in kept for c in sorted((5 * e + 7 * c + index) % full for c in range(width))]
        layers.append(LayerPlan(heads[index], tuple(channels), tuple(kept)))
    return Plan(units, tuple(layers), {"made": "by hand"})


def ids(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def compacted_as_masked(model, plan: Plan):
    """The model compacted by ``plan``, checked against the same units masked by zeros, dropped experts unreachable."""
    with torch.no_grad(), unit_masks(model, plan.units) as masks, experts_unreachable(model, plan):
        for index, layer in enumerate(plan.layers):
            for module, kept in (("attention", layer.kv_heads), ("mlp", layer.channels)):
                keep = torch.zeros_like(masks[module][index])
                keep[list(kept)] = 1
                masks[module][index].copy_(keep)
        masked = model(ids()).logits
    pruned = compact(model, plan)
    torch.testing.assert_close(pruned(ids()).logits, masked, rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in pruned.parameters()) == plan.units.total_parameters - plan.removed_parameters
    return pruned


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_masks_equal_physical_removal(family: str, shape: str) -> None:
    model = tiny_model(family)
    plan = make_plan(model, shape)
    assert compacted_as_masked(model, plan) is model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise_equal(tmp_path, family: str, shape: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    compact(model, make_plan(model, shape))
    save(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    loaded = load(tmp_path / "out")
    assert loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    stock = shape == "uniform" and family != "opt"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == (family if stock else f"saap_{family}")
    assert (tmp_path / "out/modeling_saap.py").exists() is not stock
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"saap_plan.json", "README.md", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert Plan.load(tmp_path / "out/saap_plan.json") == model.saap_plan
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_twice_writes_identical_weights(tmp_path, family: str) -> None:
    for name in ("a", "b"):
        model = tiny_model(family, torch.float32)
        save(compact(model, make_plan(model)), tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_loads_with_the_same_hidden_states(tmp_path, family: str) -> None:
    model = tiny_model(family, torch.float32)
    save(compact(model, make_plan(model)), tmp_path / "out")
    attention = model.config._attn_implementation
    base = AutoModel.from_pretrained(tmp_path / "out", attn_implementation=attention).eval()
    with torch.no_grad():
        assert torch.equal(base(ids()).last_hidden_state, model.base_model(ids()).last_hidden_state)


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_caches_equals_recomputation(tmp_path, family: str, shape: str) -> None:
    model = tiny_model(family)
    compact(model, make_plan(model, shape))
    save(model, tmp_path / "out")
    for candidate in (model, load(tmp_path / "out")):
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        plain = candidate.generate(ids(), use_cache=False, **options)
        assert torch.equal(candidate.generate(ids(), **options), plain)
        static = candidate.generate(ids(), cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static, plain)
        cache = StaticCache(config=candidate.config, max_cache_len=18)
        assert torch.equal(candidate.generate(ids(), past_key_values=cache, disable_compile=True, **options), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tmp_path, tied: bool) -> None:
    model = tiny_model("llama", torch.float32, tie_word_embeddings=tied)
    save(compact(model, make_plan(model)), tmp_path / "out")
    for candidate in (model, load(tmp_path / "out")):
        same = candidate.get_input_embeddings().weight.data_ptr() == candidate.get_output_embeddings().weight.data_ptr()
        assert same is tied


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_called_directly_loads_too(tmp_path, family: str, shape: str) -> None:
    model = tiny_model(family, torch.float32)
    compact(model, make_plan(model, shape)).save_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids()).logits, model(ids()).logits)


def test_a_pruned_checkpoint_can_be_pruned_again(tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    save(compact(model, make_plan(model)), tmp_path / "once")
    again = load(tmp_path / "once")
    units = discover(again)
    assert [layer.kv_heads for layer in units.layers] == [3, 1, 4]
    plan = Plan(units, tuple(LayerPlan((0,), tuple(range(20))) for _ in units.layers))
    save(compact(again, plan), tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "twice")(ids()).logits, again(ids()).logits)


def test_copy_leaves_the_original_alone() -> None:
    model = tiny_model("llama")
    before = model(ids()).logits
    pruned = compact(model, make_plan(model), copy=True)
    assert pruned is not model and torch.equal(model(ids()).logits, before)
    assert type(model).__name__ == "LlamaForCausalLM" and type(pruned).__name__ == "SaapLlamaForCausalLM"


def test_requires_grad_dtype_and_training_mode_are_kept() -> None:
    model = tiny_model("qwen2", torch.float16).train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    compact(model, make_plan(model))
    assert model.training and model.dtype == torch.float16
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("heads", [(0, 1, 2), (0,)])
def test_llama_sizes_its_own_class_refuses_become_a_stock_mistral(tmp_path, heads: tuple[int, ...]) -> None:
    model = tiny_model("llama", torch.float32, attention_bias=False, mlp_bias=False)
    plan = Plan(discover(model), tuple(LayerPlan(heads, tuple(range(64))) for _ in range(3)))
    compact(model, plan)
    save(model, tmp_path / "out", layout="stock")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == ("mistral" if len(heads) == 3 else "llama")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids()).logits, model(ids()).logits)


def test_layouts_that_cannot_be_are_refused_with_the_reason(tmp_path) -> None:
    model = tiny_model("llama")
    compact(model, make_plan(model))
    with pytest.raises(ValueError, match="layout='stock': its layers differ in size"):
        save(model, tmp_path / "out", layout="stock")
    opt = tiny_model("opt")
    compact(opt, make_plan(opt, "uniform"))
    with pytest.raises(ValueError, match="derives its head size from hidden_size / heads"):
        save(opt, tmp_path / "out", layout="stock")
    with pytest.raises(ValueError, match="layout must be one of auto, stock, template; got 'pickle'"):
        save(model, tmp_path / "out", layout="pickle")
    assert not list(tmp_path.iterdir())


def test_template_layout_can_be_asked_for(tmp_path) -> None:
    model = tiny_model("qwen2", torch.float32)
    compact(model, make_plan(model, "uniform"))
    save(model, tmp_path / "out", layout="template")
    assert type(model).__name__ == "Qwen2ForCausalLM"  # saving leaves the model's class alone
    loaded = load(tmp_path / "out")
    assert type(loaded).__name__ == "SaapQwen2ForCausalLM"
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)


ISOLATED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("saap", "saap_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoModel, AutoConfig
folder, attention = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=attention).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(base).__name__.startswith("Saap") and "saap" not in sys.modules
torch.save  # the result travels as text
ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    logits = model(ids).logits
print(logits.double().numpy().tobytes().hex())
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_trust_remote_code_loads_where_saap_is_not_importable(tmp_path, family: str) -> None:
    model = tiny_model(family, torch.float32)
    save(compact(model, make_plan(model)), tmp_path / "out")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf/modules")}
    command = [sys.executable, "-I", "-c", ISOLATED, str(tmp_path / "out"), model.config._attn_implementation]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(ids()).logits.double().numpy().tobytes().hex()
    assert done.stdout.splitlines()[-1] == expected


def test_the_template_is_under_200_lines_and_imports_nothing_of_ours() -> None:
    folder = Path(__file__).parents[2] / "saap/template"
    text = [(folder / name).read_text() for name in ("configuration_saap.py", "modeling_saap.py")]
    assert sum(len(t.splitlines()) for t in text) < 200
    assert not any("import saap" in t or "from saap" in t for t in text)


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["q_proj", "down_proj"]), ("phi3", ["qkv_proj", "down_proj"])]
)
def test_peft_lora_attaches_trains_and_merges(tmp_path, family: str, targets: list[str]) -> None:
    peft = pytest.importorskip("peft", reason="peft is an optional extra")
    model = tiny_model(family, torch.float32)
    save(compact(model, make_plan(model)), tmp_path / "out")
    wrapped = peft.get_peft_model(load(tmp_path / "out"), peft.LoraConfig(target_modules=targets, r=2))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    for _ in range(2):  # the first step moves B away from zero, the second A
        wrapped(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        trained = wrapped(ids()).logits
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(ids()).logits, trained, rtol=1e-4, atol=1e-4)  # fp32, another order of sums
    assert not torch.allclose(trained, model(ids()).logits)
    save(merged, tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "merged")(ids()).logits, merged(ids()).logits)


def test_layers_hold_exactly_the_kept_rows() -> None:
    model = tiny_model("opt")
    plan = make_plan(model)
    before = [
        layer.fc1.bias.clone()
        for layer in layers_of(model, __import__("saap.families", fromlist=["x"]).family_of(model))
    ]
    compact(model, plan)
    for index, layer in enumerate(model.model.decoder.layers):
        assert torch.equal(layer.fc1.bias, before[index][list(plan.layers[index].channels)])
        assert layer.self_attn.num_heads == len(plan.layers[index].kv_heads)


def test_auto_classes_are_registered_by_importing_saap(tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    save(compact(model, make_plan(model)), tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__module__ == "saap.template.modeling_saap"
