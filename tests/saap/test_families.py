"""What single families add: fused projections, norms that make sums vanish, softcaps, sizes read from the config."""

import copy
import importlib
import json
import pickle

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import saap
from saap.checkpoint import load, save
from saap.compact import compact
from saap.families import family_of, layers_of, projections_of
from saap.plan import LayerPlan, Plan
from saap.units import discover, unit_masks
from tests.saap.oracle import salience_per_sequence
from tests.saap.test_calibrate import TIGHT, measure, token_ids
from tests.saap.test_checkpoint import ids, make_plan
from tests.saap.tiny import tiny_model, tiny_tokenizer

# transformers' norms compute in fp32 even in float64 models: what vanishes is that small beside what it sums
VANISHING = 1e-5
NEW = ("qwen3", "gemma2", "phi3")


def biased_phi3() -> PreTrainedModel:
    """A Phi-3 whose fused projections have biases, as another fused family might."""
    model = tiny_model("phi3")
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
            bias = torch.randn(linear.out_features, generator=generator, dtype=torch.float64) * 0.3
            linear.bias = nn.Parameter(bias)
    return model


def test_fused_parts_are_the_row_ranges_that_the_model_splits() -> None:
    model = tiny_model("phi3")
    layer = model.model.layers[1]
    parts = projections_of(layer, family_of(model))
    assert [(name, p.start, p.stop) for name, p in parts.items()] == [
        ("q", 0, 64), ("k", 64, 96), ("v", 96, 128), ("o", 0, 64), ("gate", 0, 97), ("up", 97, 194), ("down", 0, 64),
    ]  # fmt: skip
    assert parts["k"].linear is parts["q"].linear and parts["k"].weight.data_ptr() > parts["q"].weight.data_ptr()
    assert discover(model).layers[1].kv_heads == 4


def test_fused_rows_that_cannot_be_shared_are_named() -> None:
    model = tiny_model("phi3")
    model.model.layers[0].self_attn.qkv_proj = nn.Linear(64, 127, dtype=torch.float64)
    message = r"self_attn.qkv_proj to hold rows of q, k, v, as many of q as o has columns \(64\).*; got 127 rows"
    with pytest.raises(ValueError, match=message):
        discover(model)
    model.model.layers[0].self_attn.qkv_proj = nn.Linear(64, 62, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 62 rows"):
        discover(model)


def test_biases_of_fused_parts_count_and_go_with_their_rows() -> None:
    model, sequences = biased_phi3(), token_ids(2)
    units = discover(model)
    assert units.layers[0].biases == ("q", "k", "v", "gate", "up")
    got = measure(model, [sequences])
    for (layer, name, part), sums in salience_per_sequence(model, units, list(sequences)).items():
        module, offsets = got.modules[name], units.offsets(name)
        row, where = module.rows.index(part), slice(offsets[layer], offsets[layer + 1])
        torch.testing.assert_close(module.signed[row, where], sums["signed"].mean(0), **TIGHT)
        torch.testing.assert_close(module.salience.element_mean[0, row, where], sums["first"].mean(0), **TIGHT)
    plan = make_plan(model)
    with torch.no_grad(), unit_masks(model, units) as masks:
        for index, layer in enumerate(plan.layers):
            for module, kept in (("attention", layer.kv_heads), ("mlp", layer.channels)):
                masks[module][index].zero_()[list(kept)] = 1
        masked = model(ids()).logits
    pruned = compact(model, plan)
    torch.testing.assert_close(pruned(ids()).logits, masked, rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in pruned.parameters()) == units.total_parameters - plan.removed_parameters


def test_query_and_key_norms_make_the_signed_sums_of_q_and_k_vanish() -> None:
    for family, vanishes in (("qwen3", True), ("qwen2", False)):
        attention = measure(tiny_model(family), [token_ids()]).modules["attention"]
        size = attention.salience.element_mean[0]  # [P, U], sums of |s|
        for row, part in enumerate(attention.matrices):
            small = attention.signed[row].abs() <= VANISHING * size[row]
            assert small.all() if vanishes and part in ("q", "k") else not small.any()


def test_post_norms_make_the_signed_sum_of_a_whole_sub_block_vanish() -> None:
    for family, vanishes in (("gemma2", True), ("llama", False)):
        options = {"attention_bias": False}  # of o: it scales with the rows, but belongs to no unit
        found = measure(tiny_model(family, **options), [token_ids()])
        for name in ("attention", "mlp"):
            module = found.modules[name]
            last, size = module.signed[-1].view(3, -1), module.salience.element_mean[0, len(module.matrices) - 1]
            small = last.sum(1).abs() <= VANISHING * size.view(3, -1).sum(1)
            assert small.all() if vanishes else not small.any()
            assert (last.abs().amax(1) > VANISHING * size.view(3, -1).sum(1)).all()  # single units' sums do not


def test_gemma2_is_loaded_with_an_attention_that_applies_the_softcap(tmp_path) -> None:
    model = tiny_model("gemma2", torch.float32)
    save(compact(model, make_plan(model)), tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.config._attn_implementation == "eager"
    with torch.no_grad():
        capped = loaded(ids()).logits
        for layer in loaded.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(loaded(ids()).logits, capped, rtol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt"])
def test_the_attention_implementation_can_be_changed_after_pruning(tmp_path, family: str) -> None:
    """Each implementation takes masks of its own kind: a layer left with the old one computes other logits."""
    model = tiny_model(family, torch.float32)
    save(compact(model, make_plan(model)), tmp_path / "out")
    mask = torch.ones_like(ids())
    mask[1, :4] = 0
    for candidate in (model, load(tmp_path / "out"), copy.deepcopy(model)):
        logits = []
        for attention in ("sdpa", "eager"):
            candidate.set_attn_implementation(attention)
            assert all(
                layer.get_submodule(family_of(model).attention).config._attn_implementation == attention
                for layer in layers_of(candidate, family_of(model))
            )
            with torch.no_grad():
                logits.append(candidate(ids(), attention_mask=mask).logits[mask.bool()])
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)  # fp32


def test_copies_of_a_pruned_model_have_their_own_configuration() -> None:
    model = tiny_model("phi3")
    compact(model, make_plan(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for index, layer in enumerate(other.model.layers):
            assert layer.self_attn.config.model_config is other.config is not model.config
            assert layer.self_attn.config.num_key_value_heads == (3, 1, 4)[index]
        assert other.model.rotary_emb.config.model_config is other.config
        with torch.no_grad():
            assert torch.equal(other(ids()).logits, model(ids()).logits)


def test_a_model_of_the_checkpoints_own_code_is_pruned_again(tmp_path, monkeypatch) -> None:
    model = tiny_model("phi3", torch.float32)
    save(compact(model, make_plan(model)), tmp_path / "remote")
    (tmp_path / "remote/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    foreign = importlib.import_module("remote.modeling_saap").SaapPhi3ForCausalLM
    loaded = foreign.from_pretrained(tmp_path / "remote").eval()
    units = discover(loaded)
    plan = Plan(units, tuple(LayerPlan((0,), tuple(range(20 + i))) for i, _ in enumerate(units.layers)))
    save(compact(loaded, plan), tmp_path / "out")
    assert type(loaded) is foreign
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids()).logits, loaded(ids()).logits)


def test_a_template_of_a_stock_phi3_leaves_the_model_with_its_own_configuration(tmp_path) -> None:
    model = tiny_model("phi3", torch.float32)
    compact(model, make_plan(model, "uniform"))
    save(model, tmp_path / "out", layout="template")
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    loaded = load(tmp_path / "out")
    save(loaded, tmp_path / "stock", layout="stock")  # and back
    assert json.loads((tmp_path / "stock/config.json").read_text())["model_type"] == "phi3"
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
        assert torch.equal(load(tmp_path / "stock")(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
def test_long_rope_of_phi3_is_saved_by_the_template(tmp_path, shape: str) -> None:
    """The stock configuration derives the length of the factors from hidden_size / heads."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 1.5, 2.0, 4.0],
    }  # fmt: skip
    model = tiny_model("phi3", torch.float32, rope_parameters=rope, original_max_position_embeddings=8)
    compact(model, make_plan(model, shape))
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.config.model_type == "saap_phi3"
    with torch.no_grad():
        for length in (6, 12):  # short and long factors
            assert torch.equal(loaded(ids(2, length)).logits, model(ids(2, length)).logits)


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_rope_types_that_read_the_head_count_work_in_the_template(tmp_path, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", torch.float32, rope_parameters=rope, max_position_embeddings=8)
    compact(model, make_plan(model))
    save(model, tmp_path / "out")
    with torch.no_grad():
        for length in (6, 12):  # within the positions and beyond, where "dynamic" computes its frequencies anew
            assert torch.equal(load(tmp_path / "out")(ids(2, length)).logits, model(ids(2, length)).logits)


@pytest.mark.parametrize("family", NEW)
def test_prune_goes_through_and_again_from_its_checkpoint(tmp_path, family: str) -> None:
    model, text = tiny_model(family, torch.float32), ["the quick brown fox jumps over the lazy dog. " * 4]
    save(model, tmp_path / "dense")
    for name in ("once", "twice"):
        dense = load(tmp_path / ("dense" if name == "once" else "once"))
        result = saap.prune(
            dense, tiny_tokenizer(), token_ids(4), samples=4, seq_len=12, ratio=0.15, multiple=1, eval_text=text
        )
        assert result.plan.ratio >= 0.15 and result.evaluation is not None
        save(result.model, tmp_path / name)
        with torch.no_grad():
            assert torch.equal(load(tmp_path / name)(ids()).logits, result.model(ids()).logits)
