"""Sizes that a number of devices can share: the rule, searches that keep it, and what devices make of them."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

import saap
from saap import steps
from saap.candidates import Candidates
from saap.families import family_of, layers_of, linears_of
from saap.plan import Plan
from saap.resources import Macs, named_resource
from saap.scores import Scores
from saap.search import METHODS, search
from saap.size_rules import SizeRule, allowed_counts
from saap.steps import Recipe, prune_in_steps
from saap.template.modeling_saap import set_head_counts
from saap.tensor_parallel import device_counts, splits
from saap.units import LayerUnits, Units, discover
from tests.saap.test_calibrate import token_ids
from tests.saap.test_experts_search import make_units as make_mixture
from tests.saap.test_experts_search import scored
from tests.saap.test_search import make_scores, make_units, removed_score
from tests.saap.tiny import FAMILIES, tiny_model


def as_vllm_asks(query_heads: int, kv_heads: int, width: int, devices: int) -> bool:
    """The conditions of vLLM's parallel Linears, in its own order."""
    if query_heads % devices or width % devices:
        return False
    return kv_heads % devices == 0 if kv_heads >= devices else kv_heads == 0 or devices % kv_heads == 0


def assert_shared(plan: Plan, devices: int, multiple: int) -> None:
    """Every layer can be split, and widths that changed are multiples of both numbers."""
    for sizes, layer in zip(plan.units.layers, plan.layers, strict=True):
        heads = len(layer.kv_heads)
        assert as_vllm_asks(heads * sizes.group, heads, layer.width, devices)
        assert layer.width == sizes.intermediate_size or layer.width % math.lcm(multiple, devices) == 0


def random_scores(units: Units, seed: int = 0) -> Scores:
    scores, other = make_scores(units, seed), make_scores(units, seed + 1)
    fluctuation = {"attention": other.attention, "mlp": other.mlp}
    experts = torch.arange(units.expert_offsets()[-1]).double()
    return Scores(units, scores.attention, scores.mlp, {}, fluctuation, experts)


def layer_of(kv_heads: int, group: int, width: int = 1, experts: int = 0) -> LayerUnits:
    return LayerUnits(8, kv_heads * group, kv_heads, 2, width, gated=True, experts=experts)


def test_the_rule_is_vllm_s() -> None:
    for heads, group, devices in itertools.product(range(13), range(1, 7), range(1, 13)):
        sizes = layer_of(heads, group)
        assert splits(sizes, "attention", heads, devices) is as_vllm_asks(heads * group, heads, 0, devices)


@pytest.mark.parametrize(
    ("heads", "group", "devices", "allowed"),
    [
        (3, 2, 2, [2, 1]),  # one KV head on both devices
        (8, 4, 4, [8, 4, 2, 1]),
        (8, 2, 4, [8, 4, 2]),  # of one KV head two query heads would be left for four devices
        (8, 1, 4, [8, 4]),
        (5, 2, 3, [3]),
        (4, 3, 3, [3, 1]),
        (7, 12, 6, [6, 3, 2, 1]),
        (3, 1, 4, []),
        (0, 0, 4, [0]),
        (5, 2, 1, [5, 4, 3, 2, 1]),
    ],
)
def test_numbers_of_kv_heads_that_may_stay(heads: int, group: int, devices: int, allowed: list[int]) -> None:
    for empty in (False, True):
        found = allowed_counts(layer_of(heads, group), "attention", 32, SizeRule(devices), allow_empty=empty)
        assert found == (allowed + [0] if empty and heads else allowed)


@pytest.mark.parametrize(
    ("width", "multiple", "devices", "allowed"),
    [
        (97, 8, 3, [96, 72, 48, 24]),
        (97, 32, 2, [96, 64, 32]),
        (96, 32, 3, [96]),
        (90, 8, 3, [90, 72, 48, 24]),  # a width that stays is no multiple
        (97, 128, 2, []),
        (6, 1, 4, [4]),
        (97, 128, 1, [97]),
        (0, 8, 2, [0]),
    ],
)
def test_widths_that_may_stay(width: int, multiple: int, devices: int, allowed: list[int]) -> None:
    for empty in (False, True):
        found = allowed_counts(layer_of(1, 1, width), "mlp", multiple, SizeRule(devices), allow_empty=empty)
        assert found == (allowed + [0] if empty and width else allowed)


def shards(attention: nn.Module, linears: dict[str, nn.Linear], sizes: LayerUnits, devices: int) -> list[nn.Module]:
    """The attention as each device has it: its query heads, the KV heads they read, its columns of o."""
    made = []
    for rank in range(devices):
        local = sizes.query_heads // devices
        queries = slice(rank * local * sizes.head_dim, (rank + 1) * local * sizes.head_dim)
        first, count = rank * local // sizes.group, max(1, sizes.kv_heads // devices)
        keys = slice(first * sizes.head_dim, (first + count) * sizes.head_dim)
        shard = copy.deepcopy(attention)
        twins = dict(shard.named_modules())
        names = {id(module): name for name, module in attention.named_modules()}
        for part, rows in (("q", queries), ("k", keys), ("v", keys), ("o", queries)):
            twin = twins[names[id(linears[part])]]
            twin.weight = nn.Parameter(twin.weight[:, rows] if part == "o" else twin.weight[rows])
            if twin.bias is not None:
                twin.bias = nn.Parameter(twin.bias * (rank == 0) if part == "o" else twin.bias[rows])
        set_head_counts(shard, local, count)
        if hasattr(shard, "num_key_value_groups"):
            shard.num_key_value_groups = local // count
        made.append(shard)
    return made


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3"])  # its q, k and v are one Linear
@pytest.mark.parametrize("devices", [2, 4])
def test_attention_of_a_pruned_model_is_the_sum_of_its_shards(family: str, devices: int) -> None:
    model = tiny_model(family)
    plan = search(random_scores(discover(model)), 0.5, ratio_of="blocks", multiple=8, tensor_parallel=devices)
    saap.compact(model, plan)
    units, row = discover(model), family_of(model)
    seen = []
    for layer, sizes in zip(layers_of(model, row), units.layers, strict=True):
        attention = layer.get_submodule(row.attention)
        parts = shards(attention, linears_of(layer, row), sizes, devices)

        def compare(module, args, kwargs, output, parts=parts) -> None:
            seen.append((sum(part(*args, **kwargs)[0] for part in parts), output[0]))

        attention.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        model(token_ids(2), use_cache=False)
    assert len(seen) == 3 and any(len(layer.kv_heads) < plan.units.layers[0].kv_heads for layer in plan.layers)
    for found, expected in seen:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # float64, sums in another order


def largest_reachable(scores: Scores, **options) -> float:
    with pytest.raises(ValueError, match="largest reachable ratio") as caught:
        search(scores, 0.9999, **options)
    return float(str(caught.value).rsplit(" ", 1)[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_searches_leave_what_devices_can_share(family: str, devices: int) -> None:
    units = discover(tiny_model(family))
    scores, whole = random_scores(units), units.total_parameters
    for method in METHODS:
        options = {"method": method, "multiple": 8, "tensor_parallel": devices}
        largest = largest_reachable(scores, **options)
        for share in (0.01, 0.5, 0.8, 1.0):
            plan = search(scores, budget=(1 - share * largest) * whole, **options)
            assert plan.ratio >= share * largest and plan.settings["tensor_parallel"] == devices
            assert_shared(plan, devices, 8)


@pytest.mark.parametrize("resource", ["parameters", Macs(40)])
@pytest.mark.parametrize(
    ("heads", "devices", "first"), [(3, 2, 2), (5, 2, 4), (7, 2, 6), (4, 3, 3), (5, 3, 3), (7, 3, 6), (7, 5, 5)]
)
def test_odd_numbers_of_heads_shrink_first_and_count(heads: int, devices: int, first: int, resource) -> None:
    units = make_units(layers=3, width=60, heads=heads)
    scores, counted = make_scores(units), named_resource(resource)
    whole, sizes = counted.whole(units, "model"), units.layers[0]
    head = float(counted.module(sizes, "attention", torch.tensor([1.0]).double()))
    forced = 3 * (heads - first) * head
    options = {"resource": resource, "multiple": 2, "tensor_parallel": devices}
    for budget in (whole - 1, whole - forced):
        for index, layer in enumerate(search(scores, budget=budget, **options).layers):
            best = scores.layer(index, "attention").topk(first).indices.tolist()
            assert layer.kv_heads == tuple(sorted(best)) and layer.width == 60
    more = search(scores, budget=whole - forced - 1, **options)  # one step of channels is the cheapest here or not
    gone = [(first - len(layer.kv_heads), 60 - layer.width) for layer in more.layers]
    assert sorted(map(bool, sum(gone, ()))) == [False] * 5 + [True]
    assert_shared(more, devices, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_ranking_is_the_exhaustive_optimum_where_steps_save_the_same(seed: int) -> None:
    units = make_units(layers=2, width=24)
    scores = make_scores(units, seed)
    plan = search(scores, 0.3, ratio_of="blocks", multiple=2, modules=("mlp",), tensor_parallel=3)
    best, cost = float("inf"), units.layers[0].unit_parameters("mlp")
    lost = scores.mlp.view(2, 24).sort(1).values
    for widths in itertools.product((6, 12, 18, 24), repeat=2):
        if sum(24 - width for width in widths) * cost >= 0.3 * units.block_parameters:
            best = min(best, sum(float(lost[i, : 24 - width].sum()) for i, width in enumerate(widths)))
    assert removed_score(scores, plan) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("module", ["attention", "mlp"])
def test_scores_as_they_are_count_per_unit_whatever_a_step_removes(module: str) -> None:
    units = make_units(layers=1, width=45, heads=9)
    five = Scores(units, *(torch.full((units.count(m),), 5.0).double() for m in ("attention", "mlp")))
    found = Candidates.of(five, 0, module, 5, named_resource("parameters"), by_unit=True, rule=SizeRule(2))
    assert found.ends.tolist() == ([1, 3, 5, 7, 8] if module == "attention" else [5, 15, 25, 35])
    assert found.saved[0] == found.lost[0] == 0
    assert found.forced == found.ends[0] * units.layers[0].unit_parameters(module)
    torch.testing.assert_close(found.steps()[1], torch.full_like(found.steps()[1], 5.0), rtol=1e-12, atol=0)


def test_plans_for_devices_are_nested_over_ratios() -> None:
    units = make_units(layers=4, width=48, heads=8)
    plans = [search(make_scores(units), r, multiple=8, tensor_parallel=4) for r in (0.1, 0.2, 0.3, 0.5, 0.6)]
    for small, large in itertools.pairwise(plans):
        for a, b in zip(small.layers, large.layers, strict=True):
            assert set(b.kv_heads) <= set(a.kv_heads) and set(b.channels) <= set(a.channels)


@pytest.mark.parametrize("seed", range(3))
def test_uniform_sizes_for_devices_match_exhaustive_search(seed: int) -> None:
    units = make_units(layers=3, width=25, heads=5)
    scores = make_scores(units, seed)
    plan = search(scores, 0.5, ratio_of="blocks", multiple=3, uniform=True, tensor_parallel=2)
    assert plan.uniform
    attention, mlp = (getattr(scores, m).view(3, -1).sort(1).values for m in ("attention", "mlp"))
    cost = {m: units.layers[0].unit_parameters(m) for m in ("attention", "mlp")}
    best = float("inf")
    for heads, width in itertools.product((4, 2, 1), (24, 18, 12, 6)):
        if 3 * ((5 - heads) * cost["attention"] + (25 - width) * cost["mlp"]) >= 0.5 * units.block_parameters:
            best = min(best, float(attention[:, : 5 - heads].sum() + mlp[:, : 25 - width].sum()))
    assert removed_score(scores, plan) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("ratio", "heads"), [(0.1, 8), (0.2, 8), (0.35, 4), (0.5, 4), (0.68, 2), (0.8, 2)])
def test_uniform_method_keeps_the_nearest_allowed_number_of_heads(ratio: float, heads: int) -> None:
    """Of 9 heads with 2 query heads each 4 devices can share 8, 4 and 2."""
    units = make_units(layers=3, width=80, heads=9)
    plan = search(make_scores(units), ratio, method="uniform", ratio_of="blocks", multiple=4, tensor_parallel=4)
    cost, sizes = units.layers[0].unit_parameters("mlp"), units.layers[0]
    share = ratio * units.block_parameters / (3 * (sizes.parameters("attention") + 76 * cost))  # four channels stay
    assert heads == min((8, 4, 2), key=lambda kept: abs(9 - kept - share * 9))
    assert [len(layer.kv_heads) for layer in plan.layers] == [heads] * 3 and plan.block_ratio >= ratio


def test_steps_leave_what_devices_can_share_each(monkeypatch) -> None:
    model, left = tiny_model("llama"), []

    def counted(model, plan, *arguments, **options):
        left.append(plan)
        return saap.compact(model, plan, *arguments, **options)

    monkeypatch.setattr(steps, "compact", counted)
    options = {"multiple": 8, "ratio_of": "blocks", "tensor_parallel": 2}
    recipe = Recipe(search=options, calibration={"samples": 4, "seq_len": 12}, steps=3)
    done = prune_in_steps(model, None, token_ids(4), 0.6, recipe)
    assert len(left) == 3 and done.plan.block_ratio >= 0.6 and done.plan.settings["tensor_parallel"] == 2
    for plan in (*left, done.plan):
        assert_shared(plan, 2, 8)
    assert 2 in device_counts(discover(model).layers)


def test_device_counts_are_those_that_every_layer_allows() -> None:
    assert device_counts([layer_of(8, 4, 96)] * 2) == (1, 2, 4, 8, 16, 32)
    assert device_counts([layer_of(8, 4, 96), layer_of(3, 4, 96)]) == (1,)  # 3 heads: neither 2 nor 4
    assert device_counts([layer_of(6, 2, 36, experts=4)]) == (1, 2, 3, 6, 12)
    assert device_counts([layer_of(8, 4, 0), layer_of(0, 0, 12)]) == (1, 2, 4)
    assert device_counts([layer_of(0, 0, 0)]) == (1,)
    for family in FAMILIES:
        layers = discover(tiny_model(family)).layers
        allowed = [n for n in range(1, 100) if all(as_vllm_asks(s.query_heads, s.kv_heads, s.intermediate_size, n)
                                                   for s in layers)]  # fmt: skip
        assert list(device_counts(layers)) == allowed


def test_only_plans_for_devices_say_so_and_an_edit_that_breaks_one_is_refused() -> None:
    units = make_units(layers=2, width=24, heads=4)
    scores = make_scores(units)
    assert "tensor_parallel" not in search(scores, 0.3, multiple=4).settings
    assert search(scores, 0.3, multiple=4, tensor_parallel=1).to_json() == search(scores, 0.3, multiple=4).to_json()
    body = json.loads(search(scores, 0.3, multiple=4, tensor_parallel=4).to_json())
    assert Plan.from_json(json.dumps(body)).settings["tensor_parallel"] == 4
    body["layers"][1]["channels_kept"] = "0-5"
    with pytest.raises(ValueError, match="layer 1: tensor_parallel=4 cannot split 6 channels; expected a multiple of"):
        Plan.from_json(json.dumps(body))
    body["settings"]["tensor_parallel"] = 0
    with pytest.raises(ValueError, match="tensor_parallel must be a positive number of devices; got 0"):
        Plan.from_json(json.dumps(body))


def test_experts_are_split_each_and_dropped_ones_are_none_of_it() -> None:
    units = make_mixture(width=42, experts=4)
    plan = search(scored(units), keep_experts=3, multiple=8, tensor_parallel=4)
    assert [layer.width for layer in plan.layers] == [40, 40]  # forced, though nothing else is asked for
    assert [len(layer.experts) for layer in plan.layers] == [3, 3]
    with pytest.raises(ValueError, match="layer 1: .*=4 cannot split 42 channels per expert of a protected layer"):
        search(scored(units), keep_experts=3, multiple=8, tensor_parallel=4, protect=(1,))
