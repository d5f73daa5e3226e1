"""Budgets other than parameters: what they count, that searches keep them, and latency tables."""

import json
import re

import pytest
import torch

import saap
from saap.cost import cost_of
from saap.latency import LatencyTable, device_name
from saap.resources import Bytes, Latency, Macs
from saap.search import search
from saap.units import MODULES, LayerUnits, Units, discover
from tests.saap.test_search import make_scores, make_units
from tests.saap.tiny import tiny_model


def make_table(units: Units, **changes) -> LatencyTable:
    """A staircase: attention by KV head, MLP in steps of 16 channels."""
    layer = units.layers[0]
    attention = tuple((n, 1e-5 * n + 2e-5) for n in range(1, layer.kv_heads + 1))
    mlp = tuple((n, 1e-5 * -(-n // 16) + 1e-5) for n in range(1, layer.intermediate_size + 1))
    values = {
        "device": "a device", "dtype": "float32", "tokens": 1, "context": 0, "hidden_size": layer.hidden_size,
        "head_dim": layer.head_dim, "group": layer.group, "gated": layer.gated,
        "attention": attention, "mlp": mlp, "rest": 1e-4,
    }  # fmt: skip
    return LatencyTable(**values | changes)


def taken(resource, plan) -> float:
    """What the pruned model takes of a resource, by its definition."""
    whole = resource.whole(plan.units, "model")
    for sizes, layer in zip(plan.units.layers, plan.layers, strict=True):
        for module, kept in zip(MODULES, (layer.kv_heads, layer.channels), strict=True):
            counts = torch.tensor([sizes.count(module), len(kept)], dtype=torch.float64)
            before, after = resource.module(sizes, module, counts)
            whole -= float(before - after)
    return whole


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_macs_are_those_that_evaluation_counts(family: str) -> None:
    model = tiny_model(family)
    for context in (0, 7):
        assert Macs(context).whole(discover(model), "model") == cost_of(model, context).macs_per_token


def test_bytes_cover_weights_and_cache() -> None:
    units = make_units()
    layer = units.layers[0]
    cache = 3 * 2 * layer.kv_heads * layer.head_dim * 5 * 2 * 4  # layers, keys and values, context, batch, bytes
    assert Bytes(4, context=5, batch=2).whole(units, "model") == 4 * units.total_parameters + cache


@pytest.mark.parametrize("resource", ["macs", "bytes", Macs(500), Bytes(2, context=300, batch=4), "latency"])
@pytest.mark.parametrize("method", ["global", "standardised", "uniform"])
def test_searches_keep_their_budget_and_waste_less_than_one_step(resource, method: str) -> None:
    units = make_units(layers=4, width=64, heads=4)
    if resource == "latency":
        resource = Latency(make_table(units))
    scores = make_scores(units)
    plan = search(scores, 0.3, resource=resource, method=method, multiple=8)
    if isinstance(resource, str):
        resource = {"macs": Macs(), "bytes": Bytes()}[resource]
    whole = resource.whole(units, "model")
    assert taken(resource, plan) <= 0.7 * whole * (1 + 1e-9)
    again = search(scores, budget=0.7 * whole, resource=resource, method=method, multiple=8)
    assert again.layers == plan.layers
    kept = [torch.tensor([float(units.layers[0].count(m)), 0.0], dtype=torch.float64) for m in MODULES]
    step = max(
        float(resource.module(units.layers[0], m, k)[0]) / n for m, k, n in zip(MODULES, kept, (1, 2), strict=True)
    )
    assert taken(resource, plan) > 0.7 * whole - step * (4 if method == "uniform" else 1)


def test_a_long_context_moves_a_byte_budget_from_channels_to_heads() -> None:
    units = make_units(layers=4, width=64, heads=4)
    short, long = (
        search(make_scores(units), 0.3, resource=Bytes(2, context=context), multiple=8) for context in (0, 2000)
    )
    channels = [sum(len(layer.channels) for layer in plan.layers) for plan in (short, long)]
    assert channels[0] < channels[1] == 4 * 64  # every byte goes by cached heads


def test_no_width_is_given_up_that_saves_no_time() -> None:
    units = make_units(layers=3, width=64, heads=4)
    options = {"ratio_of": "blocks", "multiple": 1, "modules": ("mlp",)}
    plan = search(make_scores(units), 0.1, resource=Latency(make_table(units)), **options)
    assert {len(layer.channels) % 16 for layer in plan.layers} == {0}  # the top of a stair, never below it
    assert plan.settings["resource"] == "latency" and plan.settings["device"] == "a device"


def test_plans_by_latency_are_the_best_of_all_at_one_layer() -> None:
    units = make_units(layers=1, width=64, heads=1)
    scores, table = make_scores(units), make_table(units)
    plan = search(scores, 0.1, resource=Latency(table), ratio_of="blocks", multiple=1, modules=("mlp",))
    whole = Latency(table).whole(units, "blocks")
    seconds = table.seconds("mlp", torch.arange(65.0))
    allowed = [n for n in range(1, 65) if float(seconds[64] - seconds[n]) >= 0.1 * whole]
    assert len(plan.layers[0].channels) == max(allowed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 9}, "measured with hidden_size 9; the model has 8"),
        ({"mlp": ((1, 1e-5), (32, 2e-5))}, "measured up to 32 mlp units, the model has 64"),
        ({"attention": ()}, "expected ascending sizes of attention"),
        ({"attention": ((2, 1e-5), (1, 2e-5))}, "expected ascending sizes of attention"),
        ({"mlp": ((1, 0.0), (64, 1e-5))}, "expected positive seconds for mlp"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    units = make_units(layers=2, width=64, heads=4)
    with pytest.raises(ValueError, match=message):
        search(make_scores(units), 0.2, resource=Latency(make_table(units, **changes)))


def test_tables_round_trip_and_are_of_this_machine_unless_said_otherwise(tmp_path) -> None:
    for name, device in (("mine", device_name()), ("other", "a device")):
        make_table(make_units(), device=device).save(tmp_path / f"{name}.json")
    assert LatencyTable.load(tmp_path / "mine.json") == make_table(make_units(), device=device_name())
    for device in ("a device", "any"):
        assert LatencyTable.load(tmp_path / "other.json", device) == make_table(make_units())
    here = re.escape(f"measured on 'a device', expected {device_name()!r}, this machine; name the device")
    for options, message in (((), here), (("another",), "measured on 'a device', expected 'another'; name")):
        with pytest.raises(ValueError, match=message):
            LatencyTable.load(tmp_path / "other.json", *options)


def test_files_that_are_no_latency_table_are_refused(tmp_path) -> None:
    for text, message in (
        ("{", "is not valid JSON"),
        ("[]", "lacks or misshapes a field"),
        (json.dumps({"format": 2}), "expected latency table format 1"),
        (json.dumps({"format": 1}), "lacks or misshapes a field"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            LatencyTable.load(tmp_path / "bad.json")


def test_pruning_warns_when_the_table_is_of_another_dtype_than_the_model(recwarn) -> None:
    units = discover(tiny_model("llama", torch.float32))
    for dtype in ("float32", "bfloat16"):
        model = tiny_model("llama", torch.float32)
        ids = torch.arange(64).view(4, 16)
        done = saap.prune(
            model, None, ids, ratio=0.2, resource=Latency(make_table(units, dtype=dtype)), samples=4, seq_len=16,
            multiple=8,
        )  # fmt: skip
        assert done.plan.settings["dtype"] == dtype
        said = [warning for warning in recwarn if "latency table" in str(warning.message)]
        assert len(said) == (dtype == "bfloat16")
    assert "measured in bfloat16, the model is in float32: the budget holds when" in str(said[0].message)
    assert said[0].filename == __file__  # where prune was called


def test_negative_quantities_are_refused() -> None:
    for make in (lambda: Macs(-1), lambda: Bytes(context=-1), lambda: Bytes(-2.0), lambda: Bytes(0.0)):
        with pytest.raises(ValueError, match="must not be negative; got -|bytes_per_value must be positive; got 0"):
            make()


def test_unknown_resources_are_named() -> None:
    with pytest.raises(
        ValueError, match="resource must be one of parameters, macs, bytes or a .*; got 'latency'.*table"
    ):
        search(make_scores(make_units()), 0.2, resource="latency")
    layer = LayerUnits(8, 6, 3, 2, 6, gated=True)
    assert Units("llama", (layer,), 10, 10, "0", head_parameters=3).head_parameters == 3
