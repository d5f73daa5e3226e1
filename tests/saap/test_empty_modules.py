"""Whole attentions and MLPs removed: the same function as zero masks, through files, caches and calibration."""

import copy
import json
import pickle

import pytest
import torch

from saap.checkpoint import load, save
from saap.compact import compact
from saap.criteria import score
from saap.plan import LayerPlan, Plan
from saap.resources import Latency
from saap.search import search
from saap.units import discover
from tests.saap.test_calibrate import assert_same, measure, token_ids
from tests.saap.test_checkpoint import compacted_as_masked, ids
from tests.saap.test_resources import make_table
from tests.saap.test_search import make_scores, make_units
from tests.saap.tiny import DENSE, tiny_model

EMPTY = {"allow_empty": True}


def hollow_plan(model) -> Plan:
    """The last layer loses its attention, the one before its MLP."""
    units = discover(model)
    heads, channels = tuple(range(units.layers[0].kv_heads)), tuple(range(units.layers[0].intermediate_size))
    layers = (LayerPlan(heads[:2], channels[:40]), LayerPlan(heads, ()), LayerPlan((), channels[7:50]))
    return Plan(units, layers, EMPTY)


def hollow(family: str, dtype=torch.float64):
    model = tiny_model(family, dtype)
    return compact(model, hollow_plan(model))


@pytest.mark.parametrize("family", DENSE)
def test_zero_masks_equal_removal(family: str) -> None:
    model = tiny_model(family)
    plan = hollow_plan(model)
    pruned = compacted_as_masked(model, plan)
    assert [(u.kv_heads, u.intermediate_size) for u in discover(pruned).layers][1:] == [
        (plan.units.layers[0].kv_heads, 0), (0, 43),
    ]  # fmt: skip


@pytest.mark.parametrize("family", DENSE)
def test_round_trip_and_caches(tmp_path, family: str) -> None:
    model = hollow(family, torch.float32)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = loaded.generate(ids(), use_cache=False, **options)
    assert torch.equal(loaded.generate(ids(), **options), plain)
    assert torch.equal(loaded.generate(ids(), cache_implementation="static", disable_compile=True, **options), plain)
    assert json.loads((tmp_path / "out/saap_plan.json").read_text())["layers"][1]["channels_kept"] == ""
    assert discover(loaded) == discover(model)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_what_is_left_is_calibrated_and_pruned_again(family: str) -> None:
    model = hollow(family)
    whole = measure(model, [token_ids(4)])
    assert whole.sequences == 4
    assert_same(measure(model, token_ids(4).split(1), checkpoint_layers=True), whole)
    for criterion in ("saap", "flap", "wanda_sp", "activation", "block_influence", "magnitude", "random"):
        plan = search(score(whole, criterion), 0.1, multiple=1, allow_empty=True)
        assert plan.layers[1].channels == () and plan.layers[2].kv_heads == ()
    before = model(ids()).logits
    assert not torch.equal(compact(model, plan)(ids()).logits, before)


def test_empty_modules_survive_pickling_copies_latency_budgets_and_the_torch_pruning_adapter() -> None:
    model = hollow("llama", torch.float32)
    before = model(ids()).logits
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with torch.no_grad():
            twin.model.layers[2].self_attn.o_proj.bias.add_(1)  # the twin's own
        assert torch.equal(model(ids()).logits, before) and not torch.equal(twin(ids()).logits, before)
    units = discover(model)
    table = make_table(discover(tiny_model("llama")))
    plan = search(make_scores(units), 0.05, resource=Latency(table), multiple=1)
    assert plan.layers[1].channels == () and plan.layers[2].kv_heads == ()
    torch_pruning = pytest.importorskip("saap.adapters.torch_pruning", reason="needs the extra torch-pruning")
    with torch_pruning.TaylorImportance().collect(model):
        model(input_ids=ids(), labels=ids()).loss.backward()


def test_baselines_of_inputs_work_where_no_mlp_is_left() -> None:
    model = tiny_model("llama")
    units = discover(model)
    compact(model, Plan(units, tuple(LayerPlan((0, 1), ()) for _ in units.layers), EMPTY))
    statistics = measure(model, [token_ids(2)])
    for name in ("flap", "wanda_sp", "activation"):
        assert score(statistics, name).mlp.shape == (0,)


def test_search_empties_modules_only_when_allowed_and_never_an_anchor() -> None:
    units = make_units(layers=3, width=8, heads=2)
    cautious = search(make_scores(units), 0.3, ratio_of="blocks", multiple=4)
    assert all(layer.kv_heads and layer.channels for layer in cautious.layers)
    bold = search(make_scores(units), 0.9, ratio_of="blocks", multiple=4, allow_empty=True)
    assert bold.layers[0].kv_heads and bold.block_ratio >= 0.9
    assert sum(not part for layer in bold.layers for part in (layer.kv_heads, layer.channels)) >= 3
    assert Plan.from_json(bold.to_json()) == bold


def test_empty_plans_are_refused_unless_they_say_so() -> None:
    units = make_units(layers=2, width=6, heads=3)
    whole = LayerPlan((0, 1, 2), tuple(range(6)))
    with pytest.raises(ValueError, match="layer 1: channels: expected at least one unit to be kept, got none"):
        Plan(units, (whole, LayerPlan((0,), ())))
    with pytest.raises(ValueError, match="layer 0: expected at least one KV head to be kept.*caches count positions"):
        Plan(units, (LayerPlan((), (1,)), whole), EMPTY)
    assert discover(tiny_model("gemma2")).anchors == (0, 1)  # sliding and full attention alternate
