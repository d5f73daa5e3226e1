"""Constraints of a search that exclude each other: what is refused, with which numbers, and what is still reached."""

import math

import pytest

import saap
from saap.search import check_ratio, search
from saap.units import Units
from tests.saap.test_experts_search import make_units as make_mixture
from tests.saap.test_experts_search import scored
from tests.saap.test_search import make_scores, make_units
from tests.saap.test_tensor_parallel import largest_reachable, layer_of
from tests.saap.tiny import tiny_model


@pytest.mark.parametrize(
    ("units", "options", "message"),
    [
        ({"heads": 3}, {"tensor_parallel": 2, "protect": (-1,)},
         "layer 2: tensor_parallel=2 cannot split 3 KV heads with 2 query heads each of a protected layer; "
         "expected a multiple of 2 KV heads"),
        ({"width": 21}, {"tensor_parallel": 2, "protect": (0,)},
         "layer 0: tensor_parallel=2 cannot split 21 channels of a protected layer; expected a multiple of 2"),
        ({"heads": 3}, {"tensor_parallel": 2, "modules": ("mlp",)}, "2 query heads each where only mlp is pruned"),
        ({"width": 21}, {"tensor_parallel": 2, "modules": ("attention",)}, "21 channels where only attention is"),
        ({"heads": 3}, {"tensor_parallel": 5}, "layer 0: .*=5 cannot split 3 KV heads .* or any smaller size that"),
        ({"width": 21}, {"tensor_parallel": 2, "multiple": 24},
         "layer 0: .*=2 cannot split 21 channels or any smaller size that it may take; expected a multiple of 2"),
        ({}, {"tensor_parallel": 0}, "tensor_parallel must be a positive number of devices; got 0"),
        ({}, {"tensor_parallel": True}, "tensor_parallel must be a positive number of devices; got True"),
        ({}, {"tensor_parallel": 2.0}, "tensor_parallel must be a positive number of devices; got 2.0"),
    ],
)  # fmt: skip
def test_layers_that_devices_cannot_share_are_named(units: dict, options: dict, message: str) -> None:
    units = make_units(**{"width": 24, "heads": 4} | units)
    options = {"multiple": 4} | options
    for call in (lambda: search(make_scores(units), 0.3, **options), lambda: check_ratio(units, 0.3, **options)):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_attention_that_no_number_of_heads_lets_devices_share_goes_where_it_may() -> None:
    whole, odd = layer_of(4, 1, 24), layer_of(3, 1, 24)
    for layers, fits in (((whole, odd), True), ((odd, whole), False)):  # the first layer must keep a head
        blocks = sum(layer.parameters(module) for layer in layers for module in ("attention", "mlp"))
        units = Units("llama", layers, blocks + 100, blocks, "0" * 16)
        options = {"budget": blocks, "multiple": 4, "tensor_parallel": 4, "allow_empty": True}
        if fits:
            assert [len(layer.kv_heads) for layer in search(make_scores(units), **options).layers] == [4, 0]
        else:
            with pytest.raises(ValueError, match="layer 0: .*=4 cannot split 3 KV heads with 1 query heads"):
                search(make_scores(units), **options)


def test_pruning_is_refused_before_calibration() -> None:
    with pytest.raises(ValueError, match=r"layer 0: tensor_parallel=5 cannot split 4 KV heads with 2 query heads each"):
        saap.prune(tiny_model("llama"), data=iter(()), ratio=0.3, tensor_parallel=5)


def test_ratios_below_what_is_forced_are_refused_with_the_number() -> None:
    units = make_units(layers=3, width=24, heads=5)
    alone = 3 * units.layers[0].unit_parameters("attention") / units.total_parameters
    number = math.ceil(alone * 1e4) / 1e4
    with pytest.raises(ValueError, match=f"^tensor_parallel=2 alone removes {number:.4f} of the model parameters: "):
        search(make_scores(units), alone / 2, multiple=4, tensor_parallel=2)
    assert search(make_scores(units), number, multiple=4, tensor_parallel=2).ratio >= number
    mixture = scored(make_mixture(width=40, experts=4))
    with pytest.raises(ValueError, match="^keep_experts=3 alone removes 0.[0-9]{4} of the model"):
        search(mixture, 0.01, multiple=8, keep_experts=3, tensor_parallel=4)
    odd = scored(make_mixture(width=42, experts=4))
    with pytest.raises(ValueError, match="^keep_experts=3 and tensor_parallel=4 alone remove 0.[0-9]{4} of the model"):
        search(odd, 0.01, multiple=8, keep_experts=3, tensor_parallel=4)


def test_unreachable_ratios_name_the_largest_that_devices_leave() -> None:
    units = make_units(layers=3, width=24, heads=4)
    options = {"multiple": 4, "ratio_of": "blocks", "tensor_parallel": 4}
    for more in ({}, {"uniform": True}, {"method": "uniform"}):
        largest = largest_reachable(make_scores(units), **options, **more)
        assert search(make_scores(units), largest, **options, **more).block_ratio >= largest
    uneven = (*units.layers[:2], layer_of(2, 2, 24))
    blocks = sum(layer.parameters(module) for layer in uneven for module in ("attention", "mlp"))
    scores = make_scores(Units("llama", uneven, blocks + 100, blocks, "0" * 16))
    reachable = search(scores, 0.6, **options)  # two layers can go down to two KV heads, the third has no fewer
    assert [len(layer.kv_heads) for layer in reachable.layers][2] == 2
    with pytest.raises(ValueError, match="by taking the same from every layer: the largest reachable ratio so is 0."):
        search(scores, reachable.block_ratio, method="uniform", **options)


def test_a_multiple_above_every_width_leaves_channels_whole() -> None:
    units = make_units(layers=3, width=24, heads=4)
    scores = make_scores(units)
    share = units.layers[0].parameters("attention") * 3 / 4 * 3 / units.block_parameters  # one of four heads stays
    plan = search(scores, share, ratio_of="blocks", multiple=32)
    assert all(layer.width == 24 and len(layer.kv_heads) == 1 for layer in plan.layers)
    with pytest.raises(ValueError, match=f"largest reachable ratio with these constraints is {share:.4f}"[:-1]):
        search(scores, share + 0.01, ratio_of="blocks", multiple=32)
    plan = search(scores, 0.1, ratio_of="blocks", multiple=8, tensor_parallel=3)  # 24 is the least of both
    assert all(layer.width == 24 and len(layer.kv_heads) == 3 for layer in plan.layers)


def test_exactly_one_of_ratio_and_budget_is_asked_for_whatever_else_is() -> None:
    units = make_units(width=24, heads=4)
    for given in ({}, {"ratio": 0.2, "budget": 100}):
        with pytest.raises(ValueError, match="give exactly one of ratio and budget; got ratio="):
            search(make_scores(units), **given, tensor_parallel=2, multiple=4)


def test_protecting_every_layer_leaves_nothing_to_remove() -> None:
    units = make_units(width=24, heads=4)
    for devices in (1, 2):
        with pytest.raises(ValueError, match="the largest reachable ratio with these constraints is 0.0000"):
            search(make_scores(units), 0.1, protect=range(3), multiple=4, tensor_parallel=devices)
