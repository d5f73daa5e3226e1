"""Plans of mixtures of experts: channels coupled by rank, whole experts dropped, budgets, and what is refused."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

import saap
from saap.candidates import Candidates
from saap.cost import cost_of
from saap.memory import activation_bytes
from saap.plan import LayerPlan, Plan
from saap.resources import Bytes, Latency, Macs, named_resource
from saap.scores import Scores
from saap.search import check_ratio, search
from saap.units import LayerUnits, Units, discover
from tests.saap.test_calibrate import measure, token_ids
from tests.saap.test_resources import make_table
from tests.saap.test_search import make_scores
from tests.saap.tiny import MIXTURES, tiny_model


def make_units(layers: int = 2, width: int = 32, experts: int = 3, used: int = 2) -> Units:
    layer = LayerUnits(8, 4, 2, 2, width, gated=True, experts=experts, experts_per_token=used)
    blocks = layers * (layer.parameters("attention") + layer.parameters("mlp") + layer.router_weights)
    return Units("mixtral", (layer,) * layers, blocks + 100, blocks, "0" * 16)


def scored(units: Units, seed: int = 0) -> Scores:
    """Random scores, and importances of experts that fall with their index in even layers and rise in odd ones."""
    rows = [torch.arange(layer.experts).double() * (-1 if i % 2 else 1) for i, layer in enumerate(units.layers)]
    scores = make_scores(units, seed)
    return Scores(units, scores.attention, scores.mlp, experts=-torch.cat(rows))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_search_is_the_exhaustive_optimum_where_experts_share_a_width(seed: int, ratio: float) -> None:
    units = make_units()
    scores = scored(units, seed)
    plan = search(scores, ratio, ratio_of="blocks", multiple=8, modules=("mlp",))
    cost, best = units.layers[0].unit_parameters("mlp"), float("inf")
    for widths in itertools.product((8, 16, 24, 32), repeat=2):
        if sum(3 * (32 - width) for width in widths) * cost < ratio * units.block_parameters:
            continue
        lost = 0.0
        for layer, width in enumerate(widths):
            lost += float(scores.layer(layer, "mlp").view(3, 32).sort(1).values[:, : 32 - width].sum())
        best = min(best, lost)
    removed = scores.mlp.sum() - sum(
        scores.layer(index, "mlp")[list(layer.channels)].sum() for index, layer in enumerate(plan.layers)
    )
    # a ranking of density is optimal up to its last step, and all steps save the same here
    assert float(removed) == pytest.approx(best, rel=1e-12)


def test_each_expert_keeps_its_own_best_channels() -> None:
    units = make_units()
    scores = scored(units)
    plan = search(scores, 0.3, multiple=8, modules=("mlp",))
    for index, layer in enumerate(plan.layers):
        assert layer.width % 8 == 0 and layer.width
        for row, own in zip(
            scores.layer(index, "mlp").view(3, 32), layer.channels_by_expert(units.layers[0]), strict=True
        ):
            assert own.tolist() == sorted(row.topk(layer.width).indices.tolist())


def test_scores_as_they_are_count_per_channel_of_one_expert() -> None:
    units = make_units()
    five = Scores(units, *(torch.full((units.count(m),), 5.0).double() for m in ("attention", "mlp")))
    for module in ("attention", "mlp"):
        found = Candidates.of(five, 0, module, 8, named_resource("parameters"), by_unit=True, allow_empty=True)
        torch.testing.assert_close(found.steps()[1], torch.full_like(found.steps()[1], 5.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("experts", "message"),
    [(torch.ones(5), r"expected expert importances of shape \(6,\), got \(5,\)"),
     (torch.full((6,), torch.nan), "expected finite expert importances")],
)  # fmt: skip
def test_importances_of_experts_are_checked(experts: torch.Tensor, message: str) -> None:
    units = make_units()
    values = [torch.zeros(units.count(m)).double() for m in ("attention", "mlp")]
    with pytest.raises(ValueError, match=message):
        Scores(units, *values, experts=experts.double())


def test_a_protected_layer_may_have_fewer_experts_than_are_kept() -> None:
    units = make_units(experts=4)
    units = replace(units, layers=(replace(units.layers[0], experts=2), units.layers[1]))
    plan = search(scored(units), keep_experts=3, protect=(0,))
    assert [len(layer.experts) for layer in plan.layers] == [2, 3]
    with pytest.raises(ValueError, match="the 2 of layer 0; got 3"):
        search(scored(units), keep_experts=3)


def test_activations_of_a_mixture_count_every_expert_that_a_token_goes_through() -> None:
    one, two = (make_units(layers=1, used=used) for used in (1, 2))
    gap = activation_bytes(two, 10, torch.float32) - activation_bytes(one, 10, torch.float32)
    assert gap == 10 * 4 * (2 * 8 + 4 * 32)  # tokens, bytes, hidden states in and out, four tensors of the width


def test_ranges_of_an_edited_plan_must_be_strings() -> None:
    body = json.loads(search(scored(make_units()), 0.3, multiple=8).to_json())
    body["layers"][1]["experts_kept"] = [0, 1]
    with pytest.raises(ValueError, match="layer 1: experts_kept: expected a string of ranges"):
        Plan.from_json(json.dumps(body))


@pytest.mark.parametrize("method", ["global", "standardised", "fluctuation", "uniform"])
@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("resource", ["parameters", Macs(16), Bytes(context=8)])
def test_every_method_reaches_every_budget(method: str, keep: int | None, resource) -> None:
    model = tiny_model("mixtral", torch.float32)
    scores = saap.score(measure(model, [token_ids(3)]))
    ratio = 0.3
    plan = search(scores, ratio, resource=resource, method=method, multiple=8, keep_experts=keep)
    pruned = saap.compact(model, plan)
    before, after = discover(tiny_model("mixtral", torch.float32)), discover(pruned)
    resource = named_resource(resource)
    assert resource.whole(after, "model") <= (1 - ratio) * resource.whole(before, "model") * (1 + 1e-12)
    assert [layer.experts for layer in after.layers] == [keep or 4] * 3
    assert after.total_parameters == before.total_parameters - plan.removed_parameters


def test_macs_of_a_search_are_those_of_the_pruned_model() -> None:
    model = tiny_model("qwen3_moe")
    plan = search(saap.score(measure(model, [token_ids(2)])), 0.3, resource=Macs(10), multiple=8, keep_experts=3)
    pruned = saap.compact(model, plan)
    assert cost_of(pruned, 10).macs_per_token == Macs(10).whole(discover(pruned), "model")
    assert cost_of(pruned, 10).macs_per_token <= 0.7 * Macs(10).whole(plan.units, "model")


def test_the_most_important_experts_stay_and_ties_go_to_the_lower_index() -> None:
    units = make_units(layers=2, experts=4)
    plan = search(scored(units), keep_experts=2)
    assert [layer.experts for layer in plan.layers] == [(0, 1), (2, 3)]
    assert plan.layers[1].channels == tuple(range(64, 128)) and plan.layers[0].kv_heads == (0, 1)
    layer = units.layers[0]
    assert plan.removed_parameters == 2 * (2 * 32 * layer.unit_parameters("mlp") + 2 * layer.hidden_size)
    equal = Scores(units, *(torch.zeros(units.count(m)).double() for m in ("attention", "mlp")), experts=torch.ones(8))
    assert [layer.experts for layer in search(equal, keep_experts=3).layers] == [(1, 2, 3)] * 2
    assert [layer.experts for layer in search(equal, keep_experts=3, protect=[0]).layers] == [(0, 1, 2, 3), (1, 2, 3)]


def test_what_is_left_of_the_ratio_comes_from_channels_and_heads() -> None:
    units = make_units(layers=2, experts=4)
    alone = search(scored(units), keep_experts=3).ratio
    plan = search(scored(units), alone + 0.1, keep_experts=3, multiple=8)
    assert plan.ratio >= alone + 0.1 and any(layer.width < 32 for layer in plan.layers)
    assert all(len(layer.experts) == 3 for layer in plan.layers)
    assert search(scored(units), alone + 1e-9, keep_experts=3, multiple=8).ratio > alone
    budget = (1 - alone / 2) * units.total_parameters  # dropping takes the model below it: nothing else goes
    assert search(scored(units), budget=budget, keep_experts=3).layers == search(scored(units), keep_experts=3).layers


def test_ratios_below_what_dropping_removes_are_refused_with_the_number() -> None:
    units = make_units(layers=2, experts=4)
    alone = search(scored(units), keep_experts=2).ratio
    message = f"keep_experts=2 alone removes {alone + 5e-5:.4f}"[:-1]
    with pytest.raises(ValueError, match=f"{message}. of the model parameters: expected a ratio of at least that"):
        search(scored(units), 0.1, keep_experts=2)
    with pytest.raises(ValueError, match="keep_experts=2 alone removes"):
        check_ratio(units, 0.1, keep_experts=2)
    with pytest.raises(ValueError, match="cannot remove 0.9900 of the model parameters: the largest reachable ratio"):
        search(scored(units), 0.99, keep_experts=2, multiple=8)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (1, "between the 2 experts that a token goes through and the 4 of layer 0; got 1"),
        (5, "and the 4 of layer 0; got 5"),
        (True, "must be a positive integer; got True"),
        (0, "must be a positive integer; got 0"),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_refused(keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(scored(make_units(experts=4)), 0.9, keep_experts=keep)


def test_dense_models_and_scores_without_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_experts is for mixtures of experts; layer 0 of this llama is dense"):
        saap.prune(tiny_model("llama"), data=token_ids(), samples=4, seq_len=12, ratio=0.3, keep_experts=2)
    with pytest.raises(ValueError, match="expected scores made by saap.score, got none"):
        search(make_scores(make_units(experts=4)), 0.5, keep_experts=2)


def test_widths_that_grouped_products_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple must be a multiple of 8 for mixtures of experts.*; got 12"):
        search(scored(make_units()), 0.2, multiple=12)
    assert search(scored(make_units()), 0.02, multiple=12, modules=("attention",)).layers[0].width == 32


def test_allow_empty_takes_attention_but_no_experts() -> None:
    plan = search(scored(make_units()), 0.7, ratio_of="blocks", multiple=8, allow_empty=True)
    assert all(layer.width >= 8 for layer in plan.layers) and not plan.layers[1].kv_heads


def test_latency_is_refused_for_experts() -> None:
    units = make_units()
    with pytest.raises(ValueError, match="latency tables are of dense MLPs"):
        search(scored(units), 0.2, resource=Latency(make_table(units)))


def test_plans_are_text_and_older_ones_load() -> None:
    plan = search(scored(make_units(experts=4)), 0.5, keep_experts=3, multiple=8)
    assert Plan.from_json(plan.to_json()) == plan
    body = json.loads(plan.to_json())
    row = body["layers"][0]
    assert (row["experts"], row["experts_kept"]) == ("3 of 4", "0-2")
    assert row["channels_per_expert"] == f"{plan.layers[0].width} of 32"
    for layer in body["layers"]:
        layer["experts_kept"] = ""  # all, and channels of all are asked for
    with pytest.raises(ValueError, match="layer 0: expected equally many channels of every kept expert"):
        Plan.from_json(json.dumps(body))
    dense = Plan(discover(tiny_model("llama")), (LayerPlan((0,), (1,)),) * 3)
    old = json.loads(dense.to_json())
    for layer in old["layers"]:
        del layer["sizes"]["experts"], layer["sizes"]["experts_per_token"]
    assert Plan.from_json(json.dumps(old)) == dense


def test_plans_that_no_tensor_can_hold_are_refused() -> None:
    units = make_units(layers=1, experts=4)
    every = tuple(range(128))
    for channels, experts, message in (
        (every[:24] + every[32:40], (0, 1), r"expected equally many channels of every kept expert.*\{0: 24, 1: 8\}"),
        (every[:40], (0, 2), "layer 0: channel 32 is of expert 1, which is not kept"),
        (every[:20] + every[32:52], (0, 1), "expected a multiple of 8 channels per expert.*got 20"),
        (every[:32], (0,), "expected at least the 2 experts that a token goes through, got 1"),
        (every[:64], (0, 4), "layer 0: experts must lie in 0 to 3; got 0 to 4"),
        (every[:64], (1, 0), "layer 0: experts must be increasing and without repeats"),
        ((), (0, 1), "layer 0: channels: expected at least one unit"),
    ):
        with pytest.raises(ValueError, match=message):
            Plan(units, (LayerPlan((0, 1), channels, experts),))
    with pytest.raises(ValueError, match="at least one, got"):
        Plan(units, (LayerPlan((0, 1), (), (0, 1)),), {"allow_empty": True})
    with pytest.raises(ValueError, match="layer 0: experts must lie in"):
        Plan(discover(tiny_model("llama", num_hidden_layers=1)), (LayerPlan((0,), (1,), (0, 1)),))


@pytest.mark.parametrize("family", MIXTURES)
def test_two_plans_one_after_the_other_are_one(family: str) -> None:
    model, ids = tiny_model(family), token_ids(3)
    first = search(saap.score(measure(model, [ids])), 0.2, keep_experts=3, multiple=8)
    once = saap.compact(model, first, copy=True)
    second = search(saap.score(measure(once, [ids])), 0.1, multiple=8)
    twice = saap.compact(once, second)
    assert second.removed_parameters
    with torch.no_grad():
        assert torch.equal(saap.compact(model, first.then(second))(ids).logits, twice(ids).logits)


def test_steps_drop_experts_once_and_reach_the_ratio() -> None:
    model = tiny_model("mixtral", torch.float32)
    options = {"data": token_ids(4), "samples": 4, "seq_len": 12, "multiple": 8}
    done = saap.prune(model, **options, ratio=0.35, keep_experts=3, steps=3)
    assert done.plan.ratio >= 0.35 and [layer.experts for layer in discover(model).layers] == [3, 3, 3]
    assert done.plan.settings["keep_experts"] == 3 and discover(model).total_parameters == (
        done.plan.units.total_parameters - done.plan.removed_parameters
    )  # fmt: skip
