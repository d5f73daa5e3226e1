"""Criteria: invariances that the formulas promise, planted units, and bad options."""

import pytest
import torch

from saap.criteria import CRITERIA, Scores, score
from saap.search import search
from saap.units import discover
from tests.saap.test_calibrate import measure, token_ids
from tests.saap.tiny import tiny_model

GRADIENT = ("saap", "vector", "element", "mask_gradient")


def assert_close(left: Scores, right: Scores, rtol: float = 1e-7) -> None:
    for name in ("attention", "mlp"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=rtol, atol=1e-13)


@torch.no_grad()
def permuted(model, heads: torch.Tensor, channels: torch.Tensor):
    """The same function with the KV groups and channels of layer 1 in another order."""
    layer = model.model.layers[1]
    d, group = layer.self_attn.head_dim, 2
    kv_rows = (heads[:, None] * d + torch.arange(d)).flatten()
    q_rows = (heads[:, None] * d * group + torch.arange(d * group)).flatten()
    for linear, rows in (
        (layer.self_attn.q_proj, q_rows),
        (layer.self_attn.k_proj, kv_rows),
        (layer.self_attn.v_proj, kv_rows),
    ):
        linear.weight.copy_(linear.weight[rows].clone())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[rows].clone())
    layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight[:, q_rows].clone())
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight.copy_(linear.weight[channels].clone())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[channels].clone())
    layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, channels].clone())
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_permuting_units_permutes_scores_and_leaves_logits(family: str) -> None:
    ids, plain = token_ids(), tiny_model(family)
    heads, channels = torch.tensor([2, 0, 3, 1]), torch.randperm(discover(plain).layers[1].intermediate_size)
    moved = permuted(tiny_model(family), heads, channels)
    torch.testing.assert_close(moved(ids).logits, plain(ids).logits, rtol=1e-9, atol=1e-10)
    before, after = measure(plain, [ids]), measure(moved, [ids])
    for name in (*GRADIENT, "magnitude"):
        a, b = score(before, name), score(after, name)
        torch.testing.assert_close(b.layer(1, "attention"), a.layer(1, "attention")[heads], rtol=1e-7, atol=1e-13)
        torch.testing.assert_close(b.layer(1, "mlp"), a.layer(1, "mlp")[channels], rtol=1e-7, atol=1e-13)
        for other in (0, 2):
            torch.testing.assert_close(b.layer(other, "mlp"), a.layer(other, "mlp"), rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("which", ["mlp", "attention"])
def test_rescaling_coupled_weights_leaves_gradient_criteria_and_changes_magnitude(which: str) -> None:
    ids, plain, scaled = token_ids(), tiny_model("llama"), tiny_model("llama")
    layer, c = scaled.model.layers[0], 3.0
    first, last = (
        (layer.mlp.up_proj, layer.mlp.down_proj) if which == "mlp" else (layer.self_attn.v_proj, layer.self_attn.o_proj)
    )
    with torch.no_grad():
        first.weight.mul_(c)
        if first.bias is not None:
            first.bias.mul_(c)
        last.weight.div_(c)
    before, after = measure(plain, [ids]), measure(scaled, [ids])
    for name in GRADIENT:
        assert_close(score(before, name), score(after, name))
    a, b = score(before, "magnitude"), score(after, "magnitude")
    assert not torch.allclose(a.layer(0, which), b.layer(0, which))


def test_a_planted_dead_unit_scores_zero_goes_first_and_changes_nothing() -> None:
    from saap.compact import compact

    ids, model = token_ids(), tiny_model("llama")
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight[:, 5] = 0
        layer.mlp.up_proj.weight[5] = 0
        layer.mlp.gate_proj.weight[5] = 0
        for linear in (layer.mlp.up_proj, layer.mlp.gate_proj):
            if linear.bias is not None:
                linear.bias[5] = 0
    statistics = measure(model, [ids])
    logits = model(ids).logits
    for name in (*GRADIENT, "magnitude"):
        scores = score(statistics, name)
        assert scores.layer(1, "mlp")[5] == 0
        plan = search(scores, budget=scores.units.total_parameters - 1, multiple=1)
        assert 5 not in plan.layers[1].channels and plan.removed_parameters == scores.units.layers[1].unit_parameters(
            "mlp"
        )
    torch.testing.assert_close(compact(model, plan)(ids).logits, logits, rtol=1e-12, atol=1e-12)


def test_uncertainty_fusion_divides_each_importance_by_twice_its_mean() -> None:
    statistics = measure(tiny_model("opt"), [token_ids()])
    fused = score(statistics, "saap", vector_order="first", element_order="mixed", aggregation="sum")
    v, e = score(statistics, "vector", order="first"), score(statistics, "element", order="mixed")
    both = [torch.cat([s.attention, s.mlp]) for s in (v, e)]
    expected = sum(values / (2 * values.mean()) for values in both)
    torch.testing.assert_close(torch.cat([fused.attention, fused.mlp]), expected)
    assert expected.mean() == pytest.approx(1.0)


@pytest.mark.parametrize("aggregation", ["joint", "sum", "prod", "max", "last"])
def test_aggregations_combine_the_coupled_matrices(aggregation: str) -> None:
    statistics = measure(tiny_model("llama"), [token_ids()])
    module = statistics.modules["mlp"]
    gate, up, down, joint, total, _ = module.salience.element_mean[0]
    expected = {
        "joint": joint, "sum": gate + up + down, "last": down, "prod": gate * up * down,
        "max": torch.maximum(torch.maximum(gate, up), down),
    }[aggregation]  # fmt: skip
    torch.testing.assert_close(score(statistics, "element", aggregation=aggregation).mlp, expected)
    torch.testing.assert_close(joint, total)


@pytest.mark.parametrize("fusion", ["uncertainty", "mean", "vector", "element"])
@pytest.mark.parametrize("aggregation", ["joint", "sum", "last"])
def test_fluctuation_is_the_deviation_over_sequences_by_the_mean(aggregation: str, fusion: str) -> None:
    model, ids = tiny_model("llama"), token_ids(5)
    statistics = measure(model, [ids])
    options = {"aggregation": aggregation, "fusion": fusion, "vector_order": "second", "element_order": "first"}
    scores = score(statistics, "saap", **options)
    assert scores.fluctuation is not None
    # the same fused importance of every sequence by itself: with the scales of all sequences together
    single = [measure(model, [row[None]]) for row in ids]
    kinds = {"vector": {"order": "second"}, "element": {"order": "first"}}
    scale = {"uncertainty": None, "mean": (0.5, 0.5), "vector": (1, 0), "element": (0, 1)}[fusion]
    if scale is None:
        wholes = [score(statistics, kind, aggregation=aggregation, **order) for kind, order in kinds.items()]
        scale = [1 / (2 * torch.cat([whole.attention, whole.mlp]).mean()) for whole in wholes]
    for name in ("attention", "mlp"):
        rows = torch.stack([
            sum(
                share * getattr(score(one, kind, aggregation=aggregation, **order), name)
                for share, (kind, order) in zip(scale, kinds.items(), strict=True)
            )
            for one in single
        ])  # fmt: skip
        torch.testing.assert_close(getattr(scores, name), rows.mean(0), rtol=1e-8, atol=1e-15)
        torch.testing.assert_close(scores.fluctuation[name], rows.std(0) / rows.mean(0), rtol=1e-6, atol=1e-12)


def test_importances_without_a_value_per_sequence_have_no_fluctuation() -> None:
    statistics = measure(tiny_model("llama"), [token_ids()])
    assert score(statistics, "saap", aggregation="prod").fluctuation is None
    assert score(statistics, "magnitude").fluctuation is None
    alone = score(measure(tiny_model("llama"), [token_ids(1)]), "element").fluctuation
    assert alone is not None and all(not values.any() for values in alone.values())


def test_own_callables_work_and_are_checked() -> None:
    statistics = measure(tiny_model("llama"), [token_ids()])
    own = score(
        statistics,
        lambda s: Scores(s.units, *(s.modules[m].input_m2.new_ones(s.units.count(m)) for m in ("attention", "mlp"))),
    )
    assert search(own, 0.1, multiple=1).removed_parameters > 0
    with pytest.raises(ValueError, match="expected the criterion to return Scores, got Tensor"):
        score(statistics, lambda s: torch.ones(3))
    with pytest.raises(ValueError, match="expected attention scores of shape"):
        score(statistics, lambda s: Scores(s.units, torch.ones(1), torch.ones(1)))
    with pytest.raises(ValueError, match="expected finite attention scores"):
        nan = torch.full((statistics.units.count("attention"),), float("nan"))
        score(statistics, lambda s: Scores(s.units, nan, torch.ones(s.units.count("mlp"))))


@pytest.mark.parametrize(
    ("criterion", "options", "message"),
    [
        ("best", {}, "unknown criterion 'best'; known: saap, vector, element, mask_gradient, flap, wanda_sp"),
        ("vector", {"coupled": True, "order": "second"}, "order must be one of first; got 'second'"),
        ("vector", {"order": "third"}, "order must be one of first, second, mixed; got 'third'"),
        ("element", {"aggregation": "mean"}, "aggregation must be one of joint, sum, prod, max, last"),
        ("saap", {"fusion": "product"}, "fusion must be one of uncertainty, mean, vector, element"),
        ("magnitude", {"norm": "l3"}, "norm must be one of l1, l2; got 'l3'"),
    ],
)
def test_bad_options_are_named(criterion: str, options: dict, message: str) -> None:
    statistics = measure(tiny_model("opt"), [token_ids(1)])
    with pytest.raises(ValueError, match=message):
        score(statistics, criterion, **options)


def test_every_criterion_is_deterministic_and_documented() -> None:
    statistics = measure(tiny_model("qwen2"), [token_ids()], coupled=True)
    for name, function in CRITERIA.items():
        assert function.__doc__ and function.__doc__.splitlines()[0].endswith((".", ")", ":"))
        assert_close(score(statistics, name), score(statistics, name), rtol=0)
