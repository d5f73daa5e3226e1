"""Statistics that outlive a step: what is left of them, what is added, and what that must not change."""

import pytest
import torch

from saap import pipeline, steps
from saap.calibrate import calibrate
from saap.compact import compact
from saap.criteria import score
from saap.prune import prune
from saap.search import search
from saap.statistics import Statistics
from saap.steps import Recipe, prune_in_steps
from saap.units import discover
from saap.warm_statistics import Sequences, left_after
from tests.saap.test_calibrate import FAMILIES, token_ids
from tests.saap.test_checkpoint import make_plan
from tests.saap.tiny import tiny_model

CALIBRATION = {"samples": 4, "seq_len": 12}


def units_of(statistics: Statistics, layer: int, module: str, unit: int) -> dict[str, torch.Tensor]:
    """Everything known of one unit: its columns of the tensors by unit and by feature."""
    found, width = statistics.modules[module], 1
    start = statistics.units.offsets(module)[layer] + unit
    if module == "attention":
        sizes = statistics.units.layers[layer]
        width = sizes.group * sizes.head_dim
    first = statistics.units.feature_offsets(module)[layer] + unit * width
    by_unit = {name: t[..., start] for name, t in found.tensors().items() if name not in found.PER_FEATURE}
    return by_unit | {name: getattr(found, name)[first : first + width] for name in found.PER_FEATURE}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_unit_that_stays_keeps_what_was_known_of_it(family: str) -> None:
    model = tiny_model(family)
    statistics, plan = calibrate(model, data=token_ids(4), **CALIBRATION), make_plan(model)
    pruned = compact(model, plan)
    left = left_after(statistics, plan, discover(pruned))
    left.check_model(discover(pruned))
    assert left.sequences == 4 and left.tokens == statistics.tokens
    for index, layer in enumerate(plan.layers):
        for module, kept in (("attention", layer.kv_heads), ("mlp", layer.channels)):
            for now, before in enumerate(kept):
                old = units_of(statistics, index, module, before)
                for name, value in units_of(left, index, module, now).items():
                    torch.testing.assert_close(value, old[name], rtol=0, atol=0)
    assert left.experts.shape[1] == discover(pruned).expert_offsets()[-1]


def test_a_plan_of_another_model_and_units_of_another_plan_are_refused() -> None:
    model = tiny_model("llama")
    statistics, plan = calibrate(model, data=token_ids(4), **CALIBRATION), make_plan(model)
    with pytest.raises(ValueError, match="expected a plan that leaves"):
        left_after(statistics, plan, discover(model))
    with pytest.raises(ValueError, match="this plan was made for a qwen2 model"):
        left_after(statistics, make_plan(tiny_model("qwen2")), discover(model))


def test_a_later_step_adds_new_sequences_to_what_is_left() -> None:
    model, seen = tiny_model("llama"), []
    data, search_options = token_ids(8), {"multiple": 1, "ratio_of": "blocks"}
    recipe = Recipe(search=search_options, calibration=CALIBRATION, steps=3, step_samples=2)
    criterion = lambda stats: seen.append(stats) or score(stats)  # noqa: E731
    done = prune_in_steps(
        model, None, data, 0.3, Recipe(criterion, search_options, CALIBRATION, steps=3, step_samples=2)
    )
    assert [each.sequences for each in seen] == [4, 6, 8]
    by_hand = tiny_model("llama")
    first = calibrate(by_hand, data=data[:4], **CALIBRATION)
    plan = search(score(first), budget=discover(by_hand).block_parameters * 0.9, **search_options)
    compact(by_hand, plan)
    second = calibrate(by_hand, data=data[4:6], samples=2, seq_len=12).merge(left_after(first, plan, discover(by_hand)))
    for name, module in second.modules.items():
        for key, value in module.tensors().items():
            torch.testing.assert_close(seen[1].modules[name].tensors()[key], value, rtol=0, atol=0)
    assert torch.equal(
        seen[1].modules["mlp"].weight_l1, calibrate(by_hand, data=data[:4], **CALIBRATION).modules["mlp"].weight_l1
    )
    assert done.plan.settings["step_samples"] == 2
    again = prune_in_steps(tiny_model("llama"), None, data, 0.3, recipe)
    assert again.plan == done.plan


def test_sequences_of_the_first_step_are_those_of_calibrate_and_later_ones_are_new() -> None:
    texts = list(token_ids(40))
    found = Sequences.of(tiny_model("llama"), None, texts, {"samples": 5, "seq_len": 24, "seed": 3}, 4, 2)
    alone = Sequences.of(tiny_model("llama"), None, texts, {"samples": 5, "seq_len": 24, "seed": 3}, 1, 2)
    assert torch.equal(found.of_step(1), alone.ids) and len(alone.ids) == 5
    known = Sequences.of(tiny_model("llama"), None, texts, {"samples": 5, "seq_len": 24, "seed": 3}, 2, 2, known=7)
    assert torch.equal(known.of_step(2), found.ids[7:9])  # behind what given statistics have seen
    assert torch.equal(torch.cat([found.of_step(step) for step in (1, 2, 3, 4)]), found.ids) and len(found.ids) == 11


def test_given_statistics_serve_the_first_step_and_are_left_as_they_are() -> None:
    model, data = tiny_model("llama"), token_ids(8)
    statistics = calibrate(model, data=data[:4], **CALIBRATION)
    before = statistics.modules["mlp"].signed.clone()
    recipe = Recipe(search={"multiple": 1}, calibration=CALIBRATION, steps=2, step_samples=3)
    done = prune_in_steps(model, None, data, 0.2, recipe, statistics=statistics)
    assert done.statistics is statistics and torch.equal(statistics.modules["mlp"].signed, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_samples": 0, "steps": 2}, "step_samples must be a positive integer; got 0"),
        ({"step_samples": True, "steps": 2}, "step_samples must be a positive integer; got True"),
        ({"step_samples": 2}, "expected steps above 1, got 1"),
        ({"step_samples": 100, "steps": 2}, "104 samples of 12 tokens need 1248 tokens"),
    ],
)
def test_bad_arguments_are_refused_before_work(monkeypatch, options: dict, message: str) -> None:
    monkeypatch.setattr(steps, "calibrate", lambda *_a, **_k: pytest.fail("calibrated before the check"))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        prune(model, data=token_ids(8), ratio=0.2, multiple=1, **CALIBRATION, **options)


def test_the_command_refuses_too_little_text_before_it_calibrates(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(pipeline, "calibrate", lambda *_a, **_k: pytest.fail("calibrated before the check"))
    job = pipeline.Job(
        tmp_path / "out", (0.2,), token_ids(8), None, None, None, None, "saap", {"multiple": 1},
        CALIBRATION | {"seed": 0}, "auto", False, steps=2, step_samples=100,
    )  # fmt: skip
    with pytest.raises(ValueError, match="104 samples of 12 tokens need 1248 tokens"):
        job.run(tiny_model("llama"), None)


def test_coupled_statistics_cannot_stay_warm() -> None:
    with pytest.raises(ValueError, match="coupled ones do not allow"):
        Recipe(calibration={"coupled": True}, steps=2, step_samples=2)
