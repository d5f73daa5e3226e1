"""Pruned mixtures of experts on disk: stock and template, every product that transformers has, commands and reports."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import saap
from saap.checkpoint import load, save
from saap.compact import compact
from saap.families import layers_of
from saap.model_info import model_info
from saap.plan import LayerPlan, Plan
from saap.units import discover
from tests.saap.command_line import run
from tests.saap.test_calibrate import token_ids
from tests.saap.test_checkpoint import compacted_as_masked, ids, make_plan
from tests.saap.tiny import MIXTURES, tiny_model, tiny_tokenizer

PRODUCTS = ("eager", "batched_mm", "grouped_mm")
COUNTS = {"mixtral": ("num_local_experts", "intermediate_size"), "qwen3_moe": ("num_experts", "moe_intermediate_size")}


def pruned(family: str, shape: str, dtype: torch.dtype = torch.float32):
    model = tiny_model(family, dtype)
    return compact(model, make_plan(model, shape))


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("family", MIXTURES)
def test_all_products_of_transformers_compute_the_same(tmp_path, family: str, shape: str) -> None:
    model = pruned(family, shape)
    save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.config._experts_implementation == "grouped_mm"  # transformers' default
    for candidate in (model, loaded):
        logits = {}
        for name in PRODUCTS:
            candidate.set_experts_implementation(name)
            for layer in candidate.model.layers:
                assert layer.mlp.experts.config._experts_implementation == name
            with torch.no_grad():
                logits[name] = candidate(ids()).logits
        for name in PRODUCTS[1:]:
            torch.testing.assert_close(logits[name], logits["eager"], rtol=1e-4, atol=1e-4)  # fp32
    asked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert asked.model.layers[0].mlp.experts.config._experts_implementation == "eager"


@pytest.mark.parametrize("family", MIXTURES)
def test_uniform_plans_are_stock_models_with_the_familys_own_sizes(tmp_path, family: str) -> None:
    save(pruned(family, "uniform"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    names = load_file(tmp_path / "out/model.safetensors")
    assert sum(".experts.2." in name for name in names) == 9  # one tensor per expert and part, as other runtimes expect
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    experts, width = COUNTS[family]
    assert getattr(loaded.config, experts) == 3 and getattr(loaded.config, width) == 16
    assert config["model_type"] == family and config["num_experts_per_tok"] == 2
    for layer in loaded.model.layers:
        assert layer.mlp.experts.gate_up_proj.shape == (3, 32, 64) and layer.mlp.gate.weight.shape == (3, 64)
    outputs = loaded(ids(), labels=ids(), output_router_logits=True)  # the loss that balances routers counts experts
    assert torch.isfinite(outputs.aux_loss) and outputs.loss > 0


@pytest.mark.parametrize("family", MIXTURES)
def test_modules_of_a_pruned_model_are_those_of_the_loaded_one(tmp_path, family: str) -> None:
    for shape in ("uniform", "non-uniform"):
        model = pruned(family, shape)
        save(model, tmp_path / shape)
        loaded = load(tmp_path / shape)
        assert type(loaded).__name__ == type(model).__name__
        for mine, theirs in zip(model.model.layers, loaded.model.layers, strict=True):
            for name in ("num_experts", "intermediate_dim", "hidden_dim"):
                assert getattr(mine.mlp.experts, name) == getattr(theirs.mlp.experts, name)
            assert mine.mlp.gate.num_experts == theirs.mlp.gate.num_experts == len(mine.mlp.gate.weight)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}


def test_the_balancing_loss_works_where_layers_differ_in_width_but_not_in_experts(tmp_path) -> None:
    model = tiny_model("qwen3_moe", torch.float32)
    layers = tuple(
        LayerPlan((0, 1), tuple(e * 24 + c for e in (0, 1, 3) for c in range(width)), (0, 1, 3))
        for width in (8, 16, 24)
    )
    compact(model, Plan(discover(model), layers))
    save(model, tmp_path / "out")
    for candidate in (model, load(tmp_path / "out")):
        assert candidate.num_experts == 3
        outputs = candidate(ids(), labels=ids(), output_router_logits=True)
        assert torch.isfinite(outputs.aux_loss)


def test_the_balancing_loss_is_switched_off_where_layers_differ_in_experts(tmp_path) -> None:
    model = tiny_model("mixtral", torch.float32, output_router_logits=True)
    every = tuple(range(4 * 24))
    layers = (LayerPlan((0, 1, 2, 3), every), *[LayerPlan((0, 1, 2, 3), tuple(range(3 * 24)), (0, 1, 2))] * 2)
    with pytest.warns(UserWarning, match="output_router_logits is switched off"):
        compact(model, Plan(discover(model), layers))
    save(model, tmp_path / "out")
    for candidate in (model, load(tmp_path / "out")):
        assert torch.isfinite(candidate(ids(), labels=ids()).loss) and not candidate.config.output_router_logits


@pytest.mark.parametrize(("name", "value"), [("num_local_experts", 8), ("intermediate_size", 40)])
def test_info_refuses_experts_that_are_not_the_configurations(tmp_path, name: str, value: int) -> None:
    save(tiny_model("mixtral", torch.float32), tmp_path / "m")
    model_info(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match="weights of experts, got 55,296"):
        model_info(tmp_path / "m")


def test_experts_hold_exactly_the_kept_channels_in_their_order() -> None:
    model = tiny_model("mixtral")
    plan, experts, router = make_plan(model), model.model.layers[1].mlp.experts, model.model.layers[1].mlp.gate
    before = [tensor.detach().clone() for tensor in (experts.gate_up_proj, experts.down_proj, router.weight)]
    experts.down_proj.requires_grad_(False)
    compact(model, plan)
    kept = plan.layers[1]
    for row, (expert, own) in enumerate(zip(kept.experts, kept.channels_by_expert(plan.units.layers[1]), strict=True)):
        both = torch.cat([own, own + 24])
        assert torch.equal(experts.gate_up_proj[row], before[0][expert][both])
        assert torch.equal(experts.down_proj[row], before[1][expert][:, own])
        assert torch.equal(router.weight[row], before[2][expert])
    assert not experts.down_proj.requires_grad and experts.gate_up_proj.requires_grad


@pytest.mark.parametrize("family", MIXTURES)
def test_attention_may_be_empty(tmp_path, family: str) -> None:
    model = tiny_model(family)
    full = make_plan(model).layers
    layers = (full[0], full[1], LayerPlan((), full[2].channels, full[2].experts))
    compacted_as_masked(model, Plan(discover(model), layers, {"allow_empty": True}))
    save(model.float(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids()).logits, model.float()(ids()).logits)


@pytest.mark.parametrize("family", MIXTURES)
def test_prune_goes_through_and_again_from_its_checkpoint(tmp_path, family: str) -> None:
    text = ["the quick brown fox jumps over the lazy dog. " * 4]
    save(tiny_model(family, torch.float32), tmp_path / "dense")
    for name, source, keep in (("once", "dense", 3), ("twice", "once", None)):
        result = saap.prune(
            load(tmp_path / source), tiny_tokenizer(), token_ids(4), samples=4, seq_len=12, ratio=0.25, multiple=8,
            keep_experts=keep, eval_text=text,
        )  # fmt: skip
        assert result.plan.ratio >= 0.25 and result.evaluation is not None
        assert {layer.experts for layer in discover(result.model).layers} == {3}
        save(result.model, tmp_path / name)
        loaded = load(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(loaded(ids()).logits, result.model(ids()).logits)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(loaded.generate(ids(), **options), loaded.generate(ids(), use_cache=False, **options))


def test_a_template_of_a_stock_mixture_goes_back_to_stock(tmp_path) -> None:
    model = pruned("qwen3_moe", "uniform")
    save(model, tmp_path / "template", layout="template")
    loaded = load(tmp_path / "template")
    assert type(loaded).__name__ == "SaapQwen3MoeForCausalLM" and type(model).__name__ == "Qwen3MoeForCausalLM"
    save(loaded, tmp_path / "stock", layout="stock")
    assert json.loads((tmp_path / "stock/config.json").read_text())["model_type"] == "qwen3_moe"
    with torch.no_grad():
        for candidate in (loaded, load(tmp_path / "stock")):
            assert torch.equal(candidate(ids()).logits, model(ids()).logits)


def test_copies_of_a_pruned_mixture_have_their_own_configuration() -> None:
    model = pruned("mixtral", "non-uniform")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_experts_implementation("eager")
        assert model.config._experts_implementation == "grouped_mm"
        for layer in layers_of(other, saap.families.family_of(other)):
            assert layer.mlp.experts.config.model_config is other.config
        with torch.no_grad():
            torch.testing.assert_close(other(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)  # fp32


def test_training_a_pruned_mixture_moves_its_experts_and_router() -> None:
    model = pruned("mixtral", "non-uniform").train()
    model(ids(), labels=ids()).loss.backward()
    for layer in model.model.layers:
        assert all(p.grad is not None and p.grad.any() for p in layer.mlp.parameters())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    saap.save(tiny_model("mixtral", torch.float32), folder / "dense", tokenizer=tiny_tokenizer())
    letters = "the quick brown fox jumps over lazy dogs. "
    (folder / "text.txt").write_text("\n\n".join(letters[i:] + letters[:i] for i in range(40)))
    return folder


COMMON = ("--samples", 4, "--seq-len", 16)


def test_the_commands_prune_describe_and_compare_a_mixture(workplace, tmp_path) -> None:
    out = tmp_path / "out"
    data = ("--data", workplace / "text.txt", *COMMON)
    options = ("--ratio", 0.4, "--multiple", 8, "--keep-experts", 3, "--eval", workplace / "text.txt", "--json")
    done = json.loads(run("prune", workplace / "dense", *data, *options, "--out", out).stdout)["outputs"][0]
    assert done["removed_share"] >= 0.4 and done["experts"] == [3, 3, 3] and max(done["channels"]) <= 24
    info = run("info", out).stdout
    assert "in each of 3 experts, 2 per token" in info and "keep experts 3" in info
    assert json.loads(run("info", out, "--json").stdout)["layers"][0]["experts"] == 3
    found = run("compare", workplace / "dense", out, "--html", tmp_path / "c.html").stdout
    assert "4 → 3" in found and "experts" in (tmp_path / "c.html").read_text()
    compared = json.loads(run("compare", workplace / "dense", out, "--json").stdout)
    assert compared["differing_layers"][0]["experts"] == [4, 3]
    page, card = (out / "saap_report.html").read_text(), (out / "README.md").read_text()
    assert "channels of each expert per layer" in page and "experts per layer" in page
    assert "| experts per layer | 3, 3, 3 |" in card and "| width of each expert per layer |" in card


def test_the_commands_plan_a_mixture_and_drop_experts_alone(workplace, tmp_path) -> None:
    statistics, plan = tmp_path / "s.safetensors", tmp_path / "plan.json"
    run("calibrate", workplace / "dense", "--data", workplace / "text.txt", *COMMON, "--out", statistics)
    shown = run("plan", statistics, "--keep-experts", 2, "--out", plan).stdout
    assert "2 of 4" in shown and "24 of 24" in shown
    run("prune", workplace / "dense", "--plan", plan, "--out", tmp_path / "out")
    layers = discover(load(tmp_path / "out")).layers
    assert {(layer.experts, layer.intermediate_size, layer.kv_heads) for layer in layers} == {(2, 24, 4)}
    assert type(load(tmp_path / "out")).__name__ == "MixtralForCausalLM"
    assert "give exactly one of ratio and budget" in run("plan", statistics, "--out", tmp_path / "x", code=2).stderr
    dry = run("prune", workplace / "dense", "--ratio", 0.4, "--multiple", 8, "--dry-run", "--data",
              workplace / "text.txt", "--out", tmp_path / "no", "--keep-experts", 3, "--json")  # fmt: skip
    assert json.loads(dry.stdout)["experts"] == 12 and not (tmp_path / "no").exists()
    for option in (("--keep-experts", 2), ("--compensate", "bias", "--multiple", 8), ("--multiple", 4)):
        failed = run("prune", workplace / "dense", "--ratio", 0.05, "--data", workplace / "text.txt", *option,
                     "--out", tmp_path / "no", code=2)  # fmt: skip
        assert "Traceback" not in failed.stderr and not (tmp_path / "no").exists()
