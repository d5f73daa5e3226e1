"""Plans as text: readable, editable, and refused when they make no sense."""

import json

import pytest

from saap.plan import LayerPlan, Plan, from_ranges, to_ranges
from tests.saap.test_search import make_units


def make_plan() -> Plan:
    units = make_units(layers=2, width=6, heads=3)
    return Plan(units, (LayerPlan((0, 2), (0, 1, 2, 5)), LayerPlan((1,), (3,))), {"criterion": "saap"})


def test_json_round_trip_is_lossless(tmp_path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_counts_and_ratios_follow_from_the_kept_units() -> None:
    plan = make_plan()
    layer = plan.units.layers[0]
    removed = 3 * layer.unit_parameters("attention") + 7 * layer.unit_parameters("mlp")
    assert plan.removed_parameters == removed
    assert plan.ratio == removed / plan.units.total_parameters
    assert not plan.uniform


def test_edited_ranges_are_applied() -> None:
    body = json.loads(make_plan().to_json())
    assert body["layers"][0]["channels_kept"] == "0-2,5"
    body["layers"][0]["channels_kept"] = "0-5"
    edited = Plan.from_json(json.dumps(body))
    assert edited.layers[0].channels == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("indices", [(), (0,), (0, 1), (1, 3, 4, 5, 9)])
def test_ranges_round_trip(indices: tuple[int, ...]) -> None:
    assert from_ranges(to_ranges(indices)) == indices


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("channels_kept", "0-9", "layer 1: channels must lie in 0 to 5; got 0 to 9"),
        ("channels_kept", "3,1", "layer 1: channels must be increasing"),
        ("channels_kept", "", "layer 1: channels: expected at least one unit"),
        ("kv_heads_kept", "", "layer 1: kv_heads: expected at least one unit"),
        ("kv_heads_kept", "a-b", 'layer 1: kv_heads_kept: expected ranges such as "0-31,40"'),
    ],
)
def test_bad_edits_name_the_layer(field: str, value: str, message: str) -> None:
    body = json.loads(make_plan().to_json())
    body["layers"][1][field] = value
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(body))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "lacks or misshapes the field 'format'"),
        ('{"format": 9}', "expected plan format 1, got 9"),
    ],
)
def test_other_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text, "some.json")
