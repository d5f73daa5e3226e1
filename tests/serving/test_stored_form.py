"""Every reader of a quantization_config of quant_method "saap" takes and leaves the same."""

from collections.abc import Callable
from pathlib import Path

import pytest

import saap
from saap.serving.vllm_rules import StoredFormat
from saap.weight_headers import Quantisation

GIVEN = {"quant_method": "saap", "version": 1, "bits": 4, "group_size": 32, "modules_to_not_convert": ["lm_head"]}
READERS: dict[str, Callable] = {
    "transformers": lambda config: saap.SaapConfig(**config).form,
    "vllm": StoredFormat.read,
    "headers": lambda config: Quantisation.of(config, Path("config.json")),
}
KEEPS: dict[str, Callable] = {
    "transformers": lambda config, name: saap.SaapConfig(**config).leaves(name),
    "vllm": lambda config, name: not StoredFormat.read(config).quantises(name, {}),
    "headers": lambda config, name: Quantisation.of(config, Path("config.json")).keeps(name),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": 0}, {"version": True}, {"version": 1.0}, {"version": "1"},
        {"bits": 3}, {"bits": "4"}, {"bits": 4.0}, {"bits": True}, {"bits": [4]}, {"bits": None},
        {"group_size": 48}, {"group_size": 32.0}, {"group_size": None}, {"group_size": [32]},
        {"modules_to_not_convert": "lm_head"}, {"modules_to_not_convert": ""}, {"modules_to_not_convert": [1]},
        {"modules_to_not_convert": {"lm_head": 1}}, {"modules_to_not_convert": 0},
    ],
    ids=str,
)  # fmt: skip
def test_what_one_reader_refuses_all_refuse(reader: str, change: dict) -> None:
    found = READERS[reader](GIVEN)
    assert (found.bits, found.group_size, found.kept) == (4, 32, ("lm_head",))
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*(expected|was written)|expected {next(iter(change))}"):
        READERS[reader](GIVEN | change)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kept", [None, [], ("a", "b")], ids=str)
def test_what_one_reader_takes_all_take(reader: str, kept) -> None:
    assert READERS[reader](GIVEN | {"modules_to_not_convert": kept}).kept == tuple(kept or ())


@pytest.mark.parametrize("reader", KEEPS)
def test_modules_are_left_by_whole_components_at_the_end_of_their_names(reader: str) -> None:
    config = GIVEN | {"modules_to_not_convert": ["mlp.gate", "q_proj", "model.layers.1.mlp.up_proj", ""]}
    expected = {
        "model.layers.0.mlp.gate": True,
        "model.layers.0.other_mlp.gate": False,
        "model.layers.0.mlp.gate.inner": False,
        "model.layers.0.self_attn.q_proj": True,
        "model.layers.0.self_attn.seq_proj": False,
        "model.layers.1.mlp.up_proj": True,
        "model.layers.11.mlp.up_proj": False,
    }
    assert {name: KEEPS[reader](config, name) for name in expected} == expected
