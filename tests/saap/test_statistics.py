"""Statistics files and what calibration refuses."""

import pytest
import torch

from saap.calibrate import calibrate
from saap.statistics import Statistics
from saap.units import discover
from tests.saap.test_calibrate import assert_same, measure, token_ids
from tests.saap.tiny import tiny_model


def test_file_round_trip_keeps_everything(tmp_path) -> None:
    statistics = measure(tiny_model("qwen2"), [token_ids()])
    statistics.data, statistics.settings = ("abc",), {"samples": 4}
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert_same(loaded, statistics, rtol=0)
    assert (loaded.data, loaded.settings, loaded.units) == (statistics.data, statistics.settings, statistics.units)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("keep", [7, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep: float) -> None:
    path = tmp_path / "s.safetensors"
    measure(tiny_model("llama"), [token_ids(1)]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        Statistics.load(path)


def test_other_safetensors_files_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected saap-statistics-2, got format None"):
        Statistics.load(tmp_path / "other.safetensors")


def test_statistics_of_another_model_are_refused() -> None:
    statistics = measure(tiny_model("llama"), [token_ids(1)])
    with pytest.raises(ValueError, match="these statistics belong to a llama model with fingerprint"):
        statistics.check_model(discover(tiny_model("llama", seed=1)))
    other = measure(tiny_model("llama", seed=1), [token_ids(1)])
    with pytest.raises(ValueError, match="expected statistics of one model, got fingerprints"):
        statistics.merge(other)


def test_merging_the_same_data_twice_is_refused() -> None:
    statistics = measure(tiny_model("llama"), [token_ids(1)])
    statistics.data = ("abc",)
    with pytest.raises(ValueError, match="both statistics cover the same calibration data"):
        statistics.merge(statistics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"seq_len": 1}, "seq_len must lie between 2 and the model's 64 positions; got 1"),
        ({"seq_len": 65}, "seq_len must lie between 2 and the model's 64 positions; got 65"),
        ({"batch_size": 0}, 'batch_size must be "auto" or a positive integer; got 0'),
        ({"checkpoint": "yes"}, "checkpoint must be True, False or \"auto\"; got 'yes'"),
    ],
)
def test_bad_sizes_are_named_before_any_work(options: dict, message: str) -> None:
    defaults = {"samples": 2, "seq_len": 8}
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model("llama"), data=token_ids(2, 8), **defaults | options)


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    vocabulary = tiny_model("llama").config.vocab_size
    with pytest.raises(ValueError, match=f"{vocabulary}"):
        calibrate(tiny_model("llama"), data=token_ids(2, 8) + vocabulary, samples=2, seq_len=8)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_nonfinite_forward_names_the_layer(family: str) -> None:
    model = tiny_model(family)
    layer = (model.model.layers if family == "llama" else model.model.decoder.layers)[1]
    norm = layer.post_attention_layernorm if family == "llama" else layer.final_layer_norm
    with torch.no_grad():
        norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="expected a finite loss.*first NaN or inf in the output of layer 1"):
        calibrate(model, data=token_ids(2, 8), samples=2, seq_len=8)


def test_nonfinite_gradient_names_the_layer_nearest_to_its_source() -> None:
    model = tiny_model("llama")

    def poison(_module, _grad_input, grad_output):
        return (grad_output[0] * float("nan"),)

    handle = model.model.layers[1].mlp.act_fn.register_full_backward_hook(poison)
    with pytest.raises(ValueError, match=r"NaN or inf in layer 1, mlp \(gate\)"):
        calibrate(model, data=token_ids(2, 8), samples=2, seq_len=8)
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())  # restored after the error
