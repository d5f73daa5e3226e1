"""Baselines against their formulas on activations and weights gathered by hand."""

import pytest
import torch

from saap.criteria import score
from saap.families import family_of, layers_of, linears_of
from saap.units import MODULES, discover
from tests.saap.oracle import salience_per_sequence
from tests.saap.test_calibrate import measure, token_ids
from tests.saap.tiny import tiny_model

PARTS = {"attention": "o", "mlp": "down"}
# inputs are recorded as fp32 sums about a shift: fp32 rounding of 48 terms
LOOSE = {"rtol": 1e-5, "atol": 1e-9}


def inputs_and_weights(model, ids):
    """{(layer, module): (input (S, T, C), weight (D, C))} of o and down, float64."""
    family, found, handles = family_of(model), {}, []
    for index, layer in enumerate(layers_of(model, family)):
        for module, part in PARTS.items():
            linear = linears_of(layer, family)[part]

            def keep(_module, args, key=(index, module), linear=linear):
                found[key] = args[0].detach().view(*ids.shape, -1), linear.weight.detach()

            handles.append(linear.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def wanda_sp(x, w, module):
    return (w.abs() * x.flatten(0, 1).norm(dim=0)).sum(0), "sum"


def flap(x, w, module):
    values = x.flatten(0, 1).var(0) * w.square().sum(0)
    return values.square() if module == "attention" else values, "mean"


def activation(x, w, module):
    return x.abs().mean(1).norm(dim=0), "norm"


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("formula", [wanda_sp, flap, activation])
def test_activation_baselines_equal_their_formulas(formula, family: str) -> None:
    model, ids = tiny_model(family), token_ids(4)
    units = discover(model)
    got = score(measure(model, ids.split(3)), formula.__name__)
    for (layer, module), (x, w) in inputs_and_weights(model, ids).items():
        values, reduce = formula(x, w, module)
        rows = values.view(units.layers[layer].count(module), -1)
        expected = {"sum": rows.sum(1), "mean": rows.mean(1), "norm": rows.norm(dim=1)}[reduce]
        torch.testing.assert_close(got.layer(layer, module), expected, **LOOSE)


def test_coupled_vector_importance_is_the_absolute_mean_of_the_signed_sums() -> None:
    model, ids = tiny_model("llama"), token_ids(4)
    units = discover(model)
    got = score(measure(model, [ids], coupled=True), "vector", coupled=True)
    truth = salience_per_sequence(model, units, list(ids))
    for layer in range(3):
        for module in MODULES:
            parts = [sums for (where, name, _), sums in truth.items() if (where, name) == (layer, module)]
            expected = sum(sums["lines"].mean(0).abs().sum(-1) for sums in parts)
            torch.testing.assert_close(got.layer(layer, module), expected, rtol=1e-8, atol=1e-14)
    with pytest.raises(ValueError, match="collect them with coupled=True"):
        score(measure(model, [ids]), "vector", coupled=True)


def test_block_influence_empties_the_least_influential_layer_first() -> None:
    from saap.search import search

    statistics = measure(tiny_model("llama"), [token_ids()])
    statistics.influence.copy_(torch.tensor([0.5, 0.1, 0.3]))
    scores = score(statistics, "block_influence")
    layer = scores.units.layers[0]
    one = layer.parameters("attention") + layer.parameters("mlp")
    small, large = (search(scores, share * one / scores.units.block_parameters, ratio_of="blocks", multiple=1)
                    for share in (0.5, 1.2))  # fmt: skip
    sizes = [[(len(part.kv_heads), len(part.channels)) for part in plan.layers] for plan in (small, large)]
    assert sizes[0][0] == sizes[0][2] == sizes[1][0] == (4, 97)  # of influence 0.5 and, at first, 0.3
    assert sizes[1][1] == (1, 1) and sizes[1][2] < (4, 97)
