"""Pruning in several steps: the same budget, plans in the dense model's numbering, and what it needs."""

import pytest
import torch

from saap import steps
from saap.calibrate import calibrate
from saap.compact import compact
from saap.compensate import compensation
from saap.plan import LayerPlan, Plan
from saap.prune import prune
from saap.resources import Macs
from saap.steps import Recipe, prune_in_steps
from saap.units import discover
from tests.saap.test_calibrate import token_ids
from tests.saap.test_search import make_units
from tests.saap.tiny import tiny_model

CALIBRATION = {"samples": 4, "seq_len": 12}


def recipe(steps: int, **changes) -> Recipe:
    options = {"multiple": 1, "ratio_of": "blocks"}
    return Recipe(search=options, calibration=CALIBRATION, steps=steps, **changes)


def steps_of(model, steps: int, ratio: float = 0.4, **options):
    return prune_in_steps(model, None, token_ids(4), ratio, recipe(steps), **options)


def test_one_step_is_calibrate_score_search_compact() -> None:
    from saap.criteria import score
    from saap.search import search

    model = tiny_model("llama")
    statistics = calibrate(model, data=token_ids(4), **CALIBRATION)
    plan = search(score(statistics), 0.4, multiple=1, ratio_of="blocks")
    done = steps_of(tiny_model("llama"), 1)
    assert done.plan == plan and done.model.saap_plan == plan


@pytest.mark.parametrize("resource", ["parameters", Macs(20)])
@pytest.mark.parametrize("steps", [2, 3])
def test_steps_reach_the_ratio_and_their_plan_makes_the_same_model_from_the_dense_one(steps: int, resource) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    made = recipe(steps)
    made.search["resource"] = resource
    done = prune_in_steps(model, None, token_ids(4), 0.4, made)
    assert done.model is model and done.plan.units == discover(dense)
    if resource == "parameters":
        assert 0.4 <= done.plan.block_ratio < 0.4 + 0.02  # one KV head of this model is 1.6 % of its blocks
    else:
        assert resource.whole(discover(model), "blocks") <= 0.6 * resource.whole(discover(dense), "blocks") * (1 + 1e-9)
    assert done.plan.settings["steps"] == steps and done.plan.settings["ratio"] == 0.4
    again = compact(dense, done.plan)
    ids = token_ids(2)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert Plan.from_json(done.plan.to_json()) == done.plan == model.saap_plan


def test_later_steps_see_what_is_left() -> None:
    plans = [steps_of(tiny_model("llama"), steps, ratio=0.6).plan.layers for steps in (1, 4)]
    assert plans[0] != plans[1]


def test_a_copy_leaves_the_dense_model_alone_and_given_statistics_serve_the_first_step() -> None:
    model, ids = tiny_model("qwen2"), token_ids(4)
    before = model(ids).logits
    statistics = calibrate(model, data=ids, **CALIBRATION)
    done = steps_of(model, 2, statistics=statistics, copy=True)
    assert done.model is not model and torch.equal(model(ids).logits, before)
    assert done.statistics is statistics and done.plan.layers == steps_of(tiny_model("qwen2"), 2).plan.layers


def test_every_step_is_compensated(monkeypatch) -> None:
    made = []

    def counted(model, plan, *arguments, **options):
        made.append(plan.units.fingerprint)
        return compensation(model, plan, *arguments, **options)

    monkeypatch.setattr(steps, "compensation", counted)
    done = prune_in_steps(
        tiny_model("llama", torch.float32), None, token_ids(4), 0.4, recipe(3, compensate="least_squares")
    )
    assert len(set(made)) == 3  # each on what the step before left
    assert done.plan.settings["compensate"] == "least_squares"


@pytest.mark.parametrize(("options", "ratio"), [({"multiple": 32}, 0.1), ({"multiple": 8, "uniform": True}, 0.3)])
def test_steps_that_earlier_ones_made_needless_are_left_out(options: dict, ratio: float) -> None:
    seen: list[tuple[int, int]] = []
    coarse = Recipe(search=options, calibration=CALIBRATION, steps=8)
    done = prune_in_steps(
        tiny_model("llama"), None, token_ids(4), ratio, coarse, progress=lambda *counts: seen.append(counts)
    )
    assert done.plan.ratio >= ratio and seen[-1] == (8000, 8000)


@pytest.mark.parametrize(("steps", "compensate", "given"), [(1, "none", False), (3, "bias", False), (2, "none", True)])
def test_progress_only_rises_and_ends_at_its_total(steps: int, compensate: str, given: bool) -> None:
    seen: list[tuple[int, int]] = []
    model = tiny_model("llama", torch.float32)
    statistics = calibrate(model, data=token_ids(4), **CALIBRATION) if given else None
    prune_in_steps(
        model, None, token_ids(4), 0.3, recipe(steps, compensate=compensate),
        statistics=statistics, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "2"])
def test_steps_must_be_a_positive_integer(steps) -> None:
    with pytest.raises(ValueError, match="steps must be a positive integer; got"):
        Recipe(steps=steps)


def test_steps_need_data_before_anything_is_done() -> None:
    model = tiny_model("llama")
    statistics = calibrate(model, data=token_ids(4), **CALIBRATION)
    with pytest.raises(ValueError, match="steps=2 calibrates again after every step: expected data, got none"):
        prune(model, ratio=0.2, steps=2, statistics=statistics, multiple=1)
    assert discover(model) == statistics.units


def test_plans_follow_each_other_in_the_first_one_s_numbering() -> None:
    units = make_units(layers=2, width=6, heads=3)
    first = Plan(units, (LayerPlan((0, 2), (1, 2, 4, 5)), LayerPlan((1,), (0, 3))))
    left = make_units(layers=2)
    sizes = [(2, 4), (1, 2)]
    layers = tuple(type(units.layers[0])(8, 2 * h, h, 2, w, gated=True) for h, w in sizes)
    second = Plan(type(units)("llama", layers, 10, 10, "1" * 16), (LayerPlan((1,), (0, 3)), LayerPlan((0,), (1,))))
    assert first.then(second).layers == (LayerPlan((2,), (1, 5)), LayerPlan((1,), (3,)))
    with pytest.raises(ValueError, match="expected a plan made for the model that the first plan leaves"):
        first.then(Plan(left, tuple(LayerPlan((0,), (0,)) for _ in range(2))))
