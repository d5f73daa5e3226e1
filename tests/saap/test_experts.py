"""Calibration of mixtures of experts beyond the oracle that all families share: routing, whole experts, refusals."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import saap
from saap.calibrate import calibrate
from saap.cost import cost_of
from saap.expert_record import RecordedExperts
from saap.families import family_of
from saap.refuse import refuse_nonfinite_weights
from saap.statistics import Statistics
from saap.units import LayerUnits, Units, discover, unit_masks
from tests.saap.oracle import salience_per_sequence
from tests.saap.test_calibrate import TIGHT, assert_same, measure, token_ids
from tests.saap.tiny import MIXTURES, tiny_model

ROUTED = {"rtol": 1e-6, "atol": 1e-9}  # transformers' routers give weights in fp32 even in float64 models


def calls_of(model, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(hidden, chosen experts, router weights) that every layer's experts get in one plain forward pass."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def outputs_of(experts, expert: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden state (n, F) and output (n, D) of one expert, by its formula."""
    gate, up = (hidden @ part.T for part in experts.gate_up_proj[expert].chunk(2))
    inner = F.silu(gate) * up
    return inner, inner @ experts.down_proj[expert].T


def with_an_idle_expert(model, expert: int = 2):
    """No token ever goes to one expert of layer 1: its router is set against a feature that is 1 for every token."""
    layer = model.model.layers[1]
    always = F.one_hot(torch.tensor(0), 64)
    with torch.no_grad():
        layer.post_attention_layernorm.weight[0] = 0
        layer.post_attention_layernorm.register_forward_hook(lambda _module, _args, out: out + always.to(out))
        layer.mlp.gate.weight[expert, 0] = -100.0
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_importance_of_experts_is_the_mean_of_router_weight_times_norm(family: str) -> None:
    model, ids = tiny_model(family), token_ids(5)
    statistics = measure(model, [ids[:2], ids[2:]])
    offsets = statistics.units.expert_offsets()
    for index, (hidden, chosen, weights) in enumerate(calls_of(model, ids)):
        experts = model.model.layers[index].mlp.experts
        for expert in range(4):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            norms = outputs_of(experts, expert, hidden[tokens])[1].norm(dim=1) * weights[tokens, places]
            importance, share = statistics.experts[:, offsets[index] + expert]
            torch.testing.assert_close(importance, norms.sum().detach().double() / ids.numel(), **ROUTED)
            assert share == pytest.approx(len(tokens) / ids.numel(), rel=1e-12)
    assert torch.allclose(statistics.experts[1].view(3, 4).sum(1), torch.tensor(2.0).double())  # two per token


def test_inputs_of_down_count_tokens_that_went_elsewhere_as_zeros() -> None:
    model, ids = tiny_model("mixtral"), token_ids()
    got = measure(model, ids.split(2)).modules["mlp"]
    inputs = []
    for index, (hidden, chosen, _) in enumerate(calls_of(model, ids)):
        for expert in range(4):
            inner = outputs_of(model.model.layers[index].mlp.experts, expert, hidden)[0].detach()
            inputs.append(inner * (chosen == expert).any(1, keepdim=True))
    every = torch.cat(inputs, 1)
    torch.testing.assert_close(got.input_mean, every.mean(0), **ROUTED)
    torch.testing.assert_close(got.input_m2, every.var(0) * (len(every) - 1), **ROUTED)
    torch.testing.assert_close(got.input_absmax, every.abs().amax(0), **ROUTED)
    activity = every.view(*ids.shape, -1).abs().mean(1).square().mean(0)
    torch.testing.assert_close(got.input_activity, activity, **ROUTED)


def test_weight_norms_are_those_of_every_expert() -> None:
    model = tiny_model("qwen3_moe")
    got = measure(model, [token_ids(1)]).modules["mlp"]
    experts = [layer.mlp.experts for layer in model.model.layers]
    gate = torch.cat([own.gate_up_proj[:, :24].abs().sum(2).flatten() for own in experts]).detach()
    up = torch.cat([own.gate_up_proj[:, 24:].square().sum(2).flatten() for own in experts]).detach()
    down = torch.cat([own.down_proj.square().sum(1).flatten() for own in experts]).detach()
    torch.testing.assert_close(got.weight_l1[0], gate)
    torch.testing.assert_close(got.weight_square[1], up)
    torch.testing.assert_close(got.weight_square[2], down)
    torch.testing.assert_close(got.column_square, down)


@pytest.mark.parametrize("family", MIXTURES)
def test_chunks_order_padding_checkpointing_and_merging_change_nothing(family: str) -> None:
    model, ids = tiny_model(family), token_ids(6)
    whole = measure(model, [ids])
    assert_same(measure(model, ids.split(1)), whole)
    assert_same(measure(model, [ids[3:], ids[:3]]), whole)
    assert_same(measure(model, [ids], checkpoint_layers=True), whole)
    assert_same(measure(model, [ids], loss_scale=64.0), whole)
    right = torch.cat([ids, torch.full((6, 4), 9)], 1), torch.cat([torch.ones_like(ids), torch.zeros(6, 4).long()], 1)
    assert_same(measure(model, [right]), whole)
    first, second = measure(model, [ids[:2]]), measure(model, [ids[2:]])
    first.data, second.data = ("a",), ("b",)
    assert_same(first.merge(second), whole)


def test_coupled_saliences_are_means_over_all_sequences() -> None:
    """A sequence without tokens of an expert counts as zeros there."""
    model, ids = tiny_model("mixtral"), token_ids(5, 3)  # short: most experts miss a sequence
    units = discover(model)
    got = measure(model, [ids], coupled=True).modules["mlp"]
    assert got.coupled is not None
    weights = [layer.mlp.experts.gate_up_proj for layer in model.model.layers]
    mean = [torch.zeros_like(weight) for weight in weights]
    for sequence in ids:
        salience_per_sequence(model, units, [])  # weights require grad from here on
        model.zero_grad()
        logits = model(input_ids=sequence[None]).logits[0]
        F.cross_entropy(logits[:-1], sequence[1:]).backward()
        for total, weight in zip(mean, weights, strict=True):
            total += (weight * weight.grad).detach() / len(ids)
    gate = torch.cat([total[:, :24].abs().sum(2).flatten() for total in mean])
    torch.testing.assert_close(got.coupled[0, 0], gate, **TIGHT)


def test_an_expert_without_tokens_scores_zero_is_named_and_does_no_harm() -> None:
    model, ids = with_an_idle_expert(tiny_model("mixtral", torch.float32)), token_ids(6)
    with pytest.warns(
        UserWarning, match="no calibration token was routed to these experts, which score 0: layer 1: 2$"
    ):
        statistics = calibrate(model, data=ids, samples=6, seq_len=12)
    assert statistics.unrouted() == {1: (2,)}
    scores = saap.score(statistics)
    idle, others = scores.layer(1, "mlp").view(4, 24)[2], scores.layer(1, "mlp").view(4, 24)[[0, 1, 3]]
    assert not idle.any() and (others > 0).all()
    plan = saap.search(scores, 0.2, multiple=8)  # it keeps as many channels as the others
    assert plan.layers[1].channels_by_expert(plan.units.layers[1]).shape == (4, plan.layers[1].width)
    assert saap.search(scores, keep_experts=3).layers[1].experts == (0, 1, 3)
    with torch.no_grad():  # removing it changes nothing: it never had a token
        before = model(ids).logits
        pruned = saap.compact(model, saap.Plan(plan.units, tuple(
            saap.LayerPlan(tuple(range(4)), tuple(c for c in range(96) if c // 24 in kept), kept)
            for kept in ((0, 1, 2, 3), (0, 1, 3), (0, 1, 2, 3))
        )))  # fmt: skip
        torch.testing.assert_close(pruned(ids).logits, before, rtol=1e-5, atol=1e-5)


def test_masks_of_ones_are_the_stock_model() -> None:
    for implementation in ("eager", "batched_mm"):
        model = tiny_model("qwen3_moe")
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            wanted = model(token_ids()).logits
            with unit_masks(model, discover(model)):
                torch.testing.assert_close(model(token_ids()).logits, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_agree_in_fp32(backend: str) -> None:
    ids = token_ids(4)
    exact = measure(tiny_model("mixtral"), [ids]).modules["mlp"].salience.element_mean
    got = measure(tiny_model("mixtral", torch.float32), [ids], backend=backend).modules["mlp"].salience.element_mean
    # fp32 forward and backward over 3 layers: about 1e-5 relative to the largest unit
    assert ((got - exact).abs() <= 1e-4 * exact.abs().amax(-1, keepdim=True)).all()


def test_autocast_measures_the_rounded_products() -> None:
    ids = token_ids(4)
    exact = measure(tiny_model("mixtral"), [ids]).modules["mlp"].salience.element_mean[1].flatten()
    model = tiny_model("mixtral", torch.float32)
    with saap.collect(model, loss_scale=1 / len(ids)) as collected:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    got = collected.statistics.modules["mlp"].salience.element_mean[1].flatten()
    # 8 bits, and a token whose second and third expert nearly tie may go elsewhere
    assert not torch.equal(got, exact) and torch.corrcoef(torch.stack([got, exact]))[0, 1] > 0.9


def test_the_experts_forward_is_given_back_after_an_exception() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(KeyError, match="planted"), saap.collect(model):
        assert "forward" in model.model.layers[0].mlp.experts.__dict__
        raise KeyError("planted")
    assert not [m for m in model.modules() if "forward" in m.__dict__]
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_backward_of_one_forward_is_refused() -> None:
    model, ids = tiny_model("mixtral"), token_ids(2)
    with pytest.raises(RuntimeError, match="a second backward pass reached"), saap.collect(model):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(retain_graph=True)
        loss.backward()


def test_products_save_nothing_of_a_weights_size() -> None:
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    shapes: list[torch.Size] = []
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        y = RecordedExperts.apply(x, experts, "gate_up_proj", [3, 0, 4, 0], lambda *_: None, True)
    assert shapes == [(7, 64), (7, 48)]
    expected = torch.cat([x[:3] @ experts.gate_up_proj[0].T, x[3:] @ experts.gate_up_proj[2].T])
    torch.testing.assert_close(y, expected)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], wanted)


def test_statistics_files_hold_experts_and_older_ones_load(tmp_path) -> None:
    statistics = measure(tiny_model("mixtral"), [token_ids(2)])
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.experts, statistics.experts) and loaded.experts.any()
    assert loaded.units == statistics.units and loaded.units.layers[0].experts == 4
    dense = discover(tiny_model("llama"))
    text = dense.to_json().replace(', "experts": 0, "experts_per_token": 0', "")
    assert "experts" not in text and Units.from_json(text) == dense


def test_sizes_and_costs_count_experts_once_and_what_a_token_uses() -> None:
    model = tiny_model("qwen3_moe")
    units = discover(model)
    layer = units.layers[1]
    assert (layer.intermediate_size, layer.experts, layer.experts_per_token, layer.count("mlp")) == (24, 4, 2, 96)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert sum(sizes.parameters("mlp") for sizes in units.layers) == experts
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert cost_of(model, 0).macs_per_token == linear + experts // 2 + 3 * 4 * 64  # half of the experts, and routers


def test_the_fingerprint_sees_experts_and_routers() -> None:
    before = discover(tiny_model("mixtral")).fingerprint
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        model = tiny_model("mixtral")
        assert discover(model).fingerprint == before
        with torch.no_grad():
            model.get_parameter(f"model.layers.2.mlp.{name}").view(-1)[0] += 1
        assert discover(model).fingerprint != before


def test_weights_that_are_not_finite_are_named() -> None:
    for name in ("gate.weight", "experts.down_proj"):
        model = tiny_model("mixtral")
        with torch.no_grad():
            model.get_parameter(f"model.layers.1.mlp.{name}").view(-1)[3] = float("inf")
        with pytest.raises(ValueError, match=f"NaN or inf in model.layers.1.mlp.{name}"):
            refuse_nonfinite_weights(model, family_of(model))


def test_dense_layers_shared_experts_and_other_mixtures_are_refused_by_name() -> None:
    for options in ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 3, "intermediate_size": 32}):
        model = tiny_model("qwen3_moe", **options)
        layer = 1 if "mlp_only_layers" in options else 0
        with pytest.raises(ValueError, match=f"layer {layer}: expected a router and experts, got Qwen3MoeMLP"):
            discover(model)
    shared = Qwen2MoeConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=16, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="mixtral, qwen3_moe are supported, without shared experts; got 'qwen2_moe'"):
        discover(AutoModelForCausalLM.from_config(shared))


def test_experts_in_other_tensors_are_refused() -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[2].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach()[:, :, :20])
    with pytest.raises(ValueError, match=r"layer 2: expected experts in tensors \(E, 2 F, D\)"):
        discover(model)


def test_the_torch_pruning_adapter_says_that_it_takes_no_experts() -> None:
    adapter = pytest.importorskip("saap.adapters.torch_pruning", reason="needs the extra torch-pruning")
    message, model = "mixtures of experts are not supported", tiny_model("mixtral")
    with pytest.raises(ValueError, match=message), adapter.TaylorImportance().collect(model):
        pass


def test_units_of_dense_models_are_described_as_before() -> None:
    layer = LayerUnits(8, 4, 2, 2, 6, gated=True)
    assert layer.count("mlp") == 6 and layer.used_share("mlp") == 1 and layer.router_weights == 0
