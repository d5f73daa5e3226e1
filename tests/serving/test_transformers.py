"""Pruned checkpoints in transformers itself: pipelines, saving again, their own code, continuous batching, PEFT."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)

import saap
from saap.plan import LayerPlan, Plan
from saap.units import discover
from tests.saap.test_checkpoint import ids, make_plan
from tests.saap.tiny import FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """No token ends or pads: answers have the length asked for."""
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    row = torch.tensor([prompt])
    found = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, do_sample=False)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_and_saving_twice_keep_every_token(tmp_path, family: str, shape: str) -> None:
    model = endless(tiny_model(family, torch.float32))
    saap.save(saap.compact(model, make_plan(model, shape)), tmp_path / "0", tokenizer=tiny_tokenizer())
    tokenizer, attention = AutoTokenizer.from_pretrained(tmp_path / "0"), model.config._attn_implementation
    want = greedy(model, tokenizer("the fox")["input_ids"], 8)
    for turn in range(3):
        folder = tmp_path / str(turn)
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, attn_implementation=attention)
        assert greedy(again, tokenizer("the fox")["input_ids"], 8) == want
        again.save_pretrained(tmp_path / str(turn + 1))
        tokenizer.save_pretrained(tmp_path / str(turn + 1))
    assert saap.load(tmp_path / "3").num_parameters() == model.num_parameters()
    options = {"attn_implementation": attention}  # Gemma 2's softcap needs eager, not 5.17's choice
    talk = pipeline("text-generation", model=str(tmp_path / "2"), device="cpu", model_kwargs=options)
    (answer,) = talk("the fox", max_new_tokens=8, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == tokenizer.decode(want, skip_special_tokens=True)


STRANGER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("saap", "saap_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for turn in range(2):
        model.save_pretrained(f"{folder}-{turn}")
        tokenizer.save_pretrained(f"{folder}-{turn}")
        model = AutoModelForCausalLM.from_pretrained(
            f"{folder}-{turn}", trust_remote_code=True, attn_implementation="eager"
        )
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (answer,) = talk("the fox", max_new_tokens=8, do_sample=False, return_full_text=False)
    print("answer", repr(answer["generated_text"]))
assert "saap" not in sys.modules
"""


def test_a_stranger_without_saap_runs_and_saves_again_what_saap_loads(tmp_path) -> None:
    wanted = []
    for family in FAMILIES:
        model = endless(tiny_model(family, torch.float32))
        saap.save(saap.compact(model, make_plan(model)), tmp_path / family, tokenizer=tiny_tokenizer())
        model.set_attn_implementation("eager")
        found = greedy(model, tiny_tokenizer()("the fox")["input_ids"], 8)
        wanted.append(f"answer {tiny_tokenizer().decode(found, skip_special_tokens=True)!r}")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf/modules")}
    command = [sys.executable, "-I", "-c", STRANGER, *(str(tmp_path / family) for family in FAMILIES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("answer")] == wanted
    for family in FAMILIES:
        with torch.no_grad():
            again, first = saap.load(tmp_path / f"{family}-1"), saap.load(tmp_path / family)
            assert torch.equal(again(ids()).logits, first(ids()).logits), family


def widths_only(model: PreTrainedModel, heads: int) -> Plan:
    """A plan that keeps ``heads`` of 4 KV heads in every layer and other widths in each."""
    units = discover(model)
    each = units.layers[0].kv_heads // 4
    kept, full = tuple(range(heads * each)), units.layers[0].intermediate_size
    if units.layers[0].experts:
        sizes = ((4, 16), (3, 8), (2, 24))
        channels = [tuple(e * full + c for e in range(count) for c in range(width)) for count, width in sizes]
        layers = [LayerPlan(kept, c, tuple(range(n))) for c, (n, _) in zip(channels, sizes, strict=True)]
    else:
        layers = [LayerPlan(kept, tuple(range(width))) for width in (40, 97, 63)]
    return Plan(units, tuple(layers))


# transformers' paged attention leaves the softcap of Gemma 2 out, in its stock model as well: without one
UNCAPPED = {"gemma2": {"attn_logit_softcapping": None}}


@pytest.mark.parametrize("heads", [4, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_works_where_only_widths_vary(tmp_path, family: str, heads: int) -> None:
    model = tiny_model(family, torch.float32, **UNCAPPED.get(family, {}))
    saap.save(saap.compact(model, widths_only(model, heads)), tmp_path / "m", layout="template")
    model = endless(saap.load(tmp_path / "m"))
    if (family, heads) == ("opt", 3):  # its stock model can only be built with heads that divide the hidden size
        with pytest.raises(ValueError, match="needs 8 KV heads per layer; layer 0 has 6"):
            batched(model)
        return
    want = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert batched(model) == want


def batched(model: PreTrainedModel) -> list[list[int]]:
    """Continuous batching of the prompts, with a cache of their size: its default takes most of the memory there is."""
    found = model.generate_batch(
        PROMPTS,
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    )
    return [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]


@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_names_the_layer_whose_kv_heads_differ(tmp_path, family: str) -> None:
    model = tiny_model(family, torch.float32)
    saap.save(saap.compact(model, make_plan(model)), tmp_path / "m")
    count, first = (8, 6) if family == "opt" else (4, 3)
    with pytest.raises(ValueError, match=f"needs {count} KV heads per layer; layer 0 has {first}"):
        saap.load(tmp_path / "m").generate_batch(PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_needs_no_target_modules_trains_saves_loads_and_merges(tmp_path, family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is an optional package")
    dense = tiny_model(family, torch.float32)
    torch.manual_seed(0)  # of the adapters' first values
    saap.save(saap.compact(dense, make_plan(dense)), tmp_path / "m")
    model = saap.load(tmp_path / "m")
    own = {"phi3": ["qkv_proj"], "qwen3_moe": ["q_proj", "v_proj"]}.get(family)  # peft has none for the stock models
    assert saap.lora_targets(model) == (own or ["q_proj", "v_proj"])
    config = peft.LoraConfig(r=2) if own is None else peft.LoraConfig(r=2, target_modules=saap.lora_targets(model))
    wrapped = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    before = wrapped(input_ids=ids(), labels=ids()).loss
    for _ in range(2):  # the first step moves B away from zero, the second A
        wrapped(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = wrapped.eval()(ids()).logits
        assert wrapped(input_ids=ids(), labels=ids()).loss < before
        again = peft.PeftModel.from_pretrained(saap.load(tmp_path / "m"), tmp_path / "adapter").eval()
        assert torch.equal(again(ids()).logits, trained)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids()).logits, trained, rtol=1e-4, atol=1e-4)  # fp32, another order of sums
    saap.save(merged, tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(saap.load(tmp_path / "merged")(ids()).logits, merged(ids()).logits)


LATER = """
import sys, saap, peft
wrapped = peft.get_peft_model(saap.load(sys.argv[1]), peft.LoraConfig())
print(len(wrapped.targeted_module_names))
"""


def test_peft_imported_after_saap_knows_pruned_models_once_one_is_loaded(tmp_path) -> None:
    pytest.importorskip("peft", reason="peft is an optional package")
    model = tiny_model("llama", torch.float32)
    saap.save(saap.compact(model, make_plan(model)), tmp_path / "m")
    done = subprocess.run([sys.executable, "-c", LATER, str(tmp_path / "m")], capture_output=True, text=True)
    assert done.stdout.strip() == "6", done.stderr
