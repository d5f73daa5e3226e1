"""Compensation of mixtures of experts: every expert by least squares over its own tokens; what is refused."""

import pytest
import torch

import saap
from saap.plan import LayerPlan, Plan
from saap.search import search
from saap.units import discover
from tests.saap.test_checkpoint import make_plan
from tests.saap.test_compensate import DAMPING, assert_close, ridge
from tests.saap.test_experts import calls_of, outputs_of, with_an_idle_expert
from tests.saap.test_experts_search import scored
from tests.saap.tiny import MIXTURES, tiny_model

DATA = torch.randint(0, 64, (9, 24), generator=torch.Generator().manual_seed(3))
OPTIONS = {"data": DATA, "samples": 9, "seq_len": 24, "batch_size": 2}  # the last micro-batch is smaller


def narrow(model, width: int = 16) -> Plan:
    """All heads and experts stay, every expert with the same channels."""
    units = discover(model)
    channels = tuple(expert * 24 + channel for expert in range(4) for channel in range(width))
    return Plan(units, (LayerPlan(tuple(range(4)), channels),) * 3)


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_has_the_ridge_solution_over_its_tokens(family: str) -> None:
    model = tiny_model(family)
    plan = make_plan(model)  # layer 0 narrow, layer 1 without an expert too, layer 2 as wide as before
    found = saap.compensation(model, plan, **OPTIONS, damping=DAMPING)
    assert "down" not in found.layers[2]
    for index, (hidden, chosen, _) in list(enumerate(calls_of(model, DATA)))[:2]:
        experts, kept = model.model.layers[index].mlp.experts, plan.layers[index]
        weight = found.layers[index]["down"].weight
        assert weight is not None and weight.shape == (len(kept.experts), 64, kept.width)
        for row, own in enumerate(kept.channels_by_expert(plan.units.layers[index])):
            expert = kept.experts[row]
            inner, outputs = outputs_of(experts, expert, hidden[(chosen == expert).any(1)])
            wanted, _ = ridge(inner[:, own], outputs, experts.down_proj[expert][:, own], affine=False)
            assert_close(weight[row], wanted.detach())


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_compensated_is_missed_less(family: str, keep: int | None, tmp_path) -> None:
    model = tiny_model(family, torch.float32)
    plan = search(scored(discover(model)), 0.25, multiple=8, modules=("mlp",), keep_experts=keep)
    found = saap.compensation(model, plan, **OPTIONS)
    errors = []
    with torch.no_grad():
        dense = [layer.detach() for layer in model.base_model(DATA, output_hidden_states=True).hidden_states]
        for fix in (None, found):
            pruned = saap.compact(model, plan, fix, copy=True)
            first = pruned.base_model(DATA, output_hidden_states=True).hidden_states[1]
            errors.append(float((first - dense[1]).square().mean()))
    assert errors[1] < (0.9 if keep is None else 1.0) * errors[0]  # nothing makes up for the experts that are gone
    saap.save(pruned, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(saap.load(tmp_path / "out")(DATA).logits, pruned(DATA).logits)


def test_streaming_and_micro_batches_change_nothing() -> None:
    model = tiny_model("mixtral")
    plan = narrow(model)
    whole = saap.compensation(model, plan, **OPTIONS | {"batch_size": 9})
    for options in ({"stream": True}, {"batch_size": 4}):
        found = saap.compensation(model, plan, **OPTIONS | options)
        for mine, theirs in zip(whole.layers, found.layers, strict=True):
            assert_close(theirs["down"].weight, mine["down"].weight)
    assert not [m for m in model.modules() if "forward" in m.__dict__]


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    model = with_an_idle_expert(tiny_model("mixtral"))
    found = saap.compensation(model, narrow(model), **OPTIONS)
    weight, own = found.layers[1]["down"].weight, model.model.layers[1].mlp.experts.down_proj[..., :16]
    assert weight is not None and torch.equal(weight[2], own[2]) and not torch.equal(weight[1], own[1])


def test_prune_compensates_a_mixture() -> None:
    result = saap.prune(
        tiny_model("qwen3_moe", torch.float32), **OPTIONS, ratio=0.3, multiple=8, compensate="least_squares", steps=2
    )
    assert result.plan.ratio >= 0.3 and result.plan.settings["compensate"] == "least_squares"


def test_biases_and_pruned_inputs_are_refused_for_experts() -> None:
    model = tiny_model("mixtral", torch.float32)
    with pytest.raises(ValueError, match="compensate 'bias' is not supported for the experts of a mixtral model"):
        saap.prune(model, data=[], ratio=0.3, compensate="bias")
    with pytest.raises(ValueError, match="experts have no biases to compensate by; layer 0 loses channels"):
        saap.compensation(model, narrow(model), **OPTIONS, method="bias")
    with pytest.raises(ValueError, match="a mixture of experts .mixtral. is compensated on inputs of the dense model"):
        saap.compensation(model, narrow(model), **OPTIONS, inputs="pruned")


def test_auto_is_dense_inputs_where_experts_are_dropped() -> None:
    model = tiny_model("mixtral")
    units = discover(model)
    all_of = tuple(range(2 * 24))
    layers = tuple(LayerPlan(heads, all_of, (0, 1)) for heads in ((0, 1, 2, 3), (0, 1, 2, 3), (0, 1)))
    found = saap.compensation(model, Plan(units, layers), **OPTIONS)
    assert found.settings["compensation_inputs"] == "dense" and [list(own) for own in found.layers] == [[], [], ["o"]]


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_attention_of_a_mixture_is_compensated_in_every_way(method: str) -> None:
    model = tiny_model("qwen3_moe")
    plan = search(scored(discover(model)), 0.03, modules=("attention",))
    found = saap.compensation(model, plan, **OPTIONS, method=method)
    assert {part for layer in found.layers for part in layer} == {"o"}
    with torch.no_grad():
        dense = model.base_model(DATA).last_hidden_state
        errors = [
            (saap.compact(model, plan, fix, copy=True).base_model(DATA).last_hidden_state - dense).square().mean()
            for fix in (None, found)
        ]
    assert errors[1] < errors[0]
