"""Compensated models as checkpoints: added biases go with them, stock or template; and the commands that make them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

import saap
from saap.checkpoint import load, save
from saap.plan import LayerPlan, Plan
from tests.saap.command_line import run
from tests.saap.test_checkpoint import ISOLATED, ids, make_plan
from tests.saap.test_cli import CALIBRATION, prune, workplace  # noqa: F401  # a fixture
from tests.saap.test_compensate import OPTIONS, PLAIN
from tests.saap.test_prune import OPTIONS as PRUNE_OPTIONS
from tests.saap.test_prune import TEXT
from tests.saap.tiny import tiny_model, tiny_tokenizer

KINDS = ("plain llama", "mistral", "qwen2", "opt")


def compensated(kind: str, shape: str, method: str = "bias", dtype: torch.dtype = torch.float32):
    model = tiny_model("llama", dtype, **PLAIN) if kind == "plain llama" else tiny_model(kind, dtype)
    plan = make_plan(model, shape)
    return saap.compact(model, plan, saap.compensation(model, plan, **OPTIONS, method=method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["bias", "least_squares"])
@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bitwise_equal(tmp_path, kind: str, shape: str, method: str, dtype: torch.dtype) -> None:
    model = compensated(kind, shape, method, dtype)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
        base = AutoModel.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(base(ids()).last_hidden_state, model.base_model(ids()).last_hidden_state)
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    config = json.loads((tmp_path / "out/config.json").read_text())
    stays_stock = shape == "uniform" and kind != "opt" and (method == "least_squares" or kind == "plain llama")
    assert config["model_type"].startswith("saap_") is not stays_stock
    assert load(tmp_path / "out").config.to_dict().get("attention_bias") == config.get("attention_bias")
    if method == "bias" and kind != "opt":
        expected = ("o", "down")
        if stays_stock:
            assert config["attention_bias"] and config["mlp_bias"]
            expected = ("q", "k", "v", "o", "gate", "up", "down")
            assert not model.model.layers[1].self_attn.q_proj.bias.any()
        elif kind == "qwen2":
            expected = ("q", "k", "v", "o", "down")
        assert all(layer.biases == expected for layer in saap.discover(loaded).layers)
    assert json.loads((tmp_path / "out/saap_plan.json").read_text())["settings"]["compensate"] == method
    assert f"compensate {method}" in (tmp_path / "out/README.md").read_text()


def test_layers_that_lose_nothing_get_a_bias_of_zeros() -> None:
    model = compensated("mistral", "non-uniform")
    assert not model.model.layers[2].mlp.down_proj.bias.any()  # all 97 channels stay there
    assert model.model.layers[1].mlp.down_proj.bias.any()
    assert model.model.layers[2].mlp.down_proj.bias.requires_grad


@pytest.mark.parametrize("kind", ["plain llama", "qwen2"])
def test_trust_remote_code_loads_added_biases_where_saap_is_not_importable(tmp_path, kind: str) -> None:
    model = compensated(kind, "non-uniform")
    save(model, tmp_path / "out")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf/modules")}
    command = [sys.executable, "-I", "-c", ISOLATED, str(tmp_path / "out"), "sdpa"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert done.stdout.splitlines()[-1] == model(ids()).logits.double().numpy().tobytes().hex()


@pytest.mark.parametrize("method", ["none", "bias", "least_squares"])
@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
def test_a_checkpoint_with_added_biases_can_be_pruned_again(tmp_path, shape: str, method: str) -> None:
    save(compensated("plain llama", shape), tmp_path / "once")
    again = load(tmp_path / "once")
    units = saap.discover(again)
    plan = Plan(units, tuple(LayerPlan((0,), tuple(range(20))) for _ in units.layers))
    new = None if method == "none" else saap.compensation(again, plan, **OPTIONS, method=method)
    if new is not None:
        assert all(found.bias is not None for layer in new.layers for found in layer.values())
    save(saap.compact(again, plan, new), tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "twice")(ids()).logits, again(ids()).logits)
    assert saap.discover(again).layers[0].biases == units.layers[0].biases


def test_a_stock_layout_that_has_no_place_for_the_biases_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="layout='stock': .* other tensors .*o_proj.bias"):
        save(compensated("mistral", "uniform"), tmp_path / "out", layout="stock")
    save(compensated("mistral", "uniform", "least_squares"), tmp_path / "out", layout="stock")
    save(compensated("plain llama", "uniform"), tmp_path / "llama", layout="template")
    with torch.no_grad():  # and back: a template whose biases are those of a stock Llama
        model = load(tmp_path / "llama")
        save(model, tmp_path / "stock", layout="stock")
        assert torch.equal(load(tmp_path / "stock")(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_prune_compensates(method: str) -> None:
    plain, model = (tiny_model("llama", torch.float32, **PLAIN) for _ in range(2))
    result = saap.prune(model, tiny_tokenizer(), iter(TEXT), ratio=0.2, compensate=method, **PRUNE_OPTIONS)
    assert result.model is model and model.saap_plan.settings["compensate"] == method
    saap.prune(plain, tiny_tokenizer(), TEXT, ratio=0.2, **PRUNE_OPTIONS)
    assert not torch.equal(plain(ids()).logits, model(ids()).logits)


def test_prune_refuses_a_compensation_without_text_or_of_another_name() -> None:
    model = tiny_model("llama", torch.float32)
    statistics = saap.calibrate(model, tiny_tokenizer(), TEXT, samples=4, seq_len=16)
    with pytest.raises(ValueError, match="compensate 'bias' needs calibration text, which neither a plan nor"):
        saap.prune(model, tiny_tokenizer(), ratio=0.2, statistics=statistics, compensate="bias")
    with pytest.raises(ValueError, match="compensate must be one of none, bias, least_squares; got 'flap'"):
        saap.prune(model, tiny_tokenizer(), TEXT, ratio=0.2, statistics=statistics, compensate="flap")


def test_the_command_compensates_each_model_of_a_sweep(workplace, tmp_path, monkeypatch) -> None:  # noqa: F811
    calls = []
    counted = lambda *args, **kwargs: calls.append(1) or saap.compensated_scores(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("saap.steps.compensated_scores", counted)
    done = prune(workplace, "--ratio", "0.1,0.3", "--out", tmp_path / "out", "--compensate", "least_squares", "--json",
                 "--compensated-scores", "on")  # fmt: skip
    outputs = json.loads(done.stdout)["outputs"]
    assert len(outputs) == 2
    assert all(output["scores"].startswith("searched by compensated scores of ") for output in outputs)
    for output in outputs:
        plan = json.loads((tmp_path / "out" / output["out"].rpartition("/")[2] / "saap_plan.json").read_text())
        assert plan["settings"]["compensate"] == "least_squares"
    assert len(calls) == 1  # both ratios go by one pass
    from_plan = ("--plan", tmp_path / "out/ratio-0.3/saap_plan.json", "--out", tmp_path / "again")
    run("prune", workplace / "dense", *from_plan, "--data", workplace / "text.txt", *CALIBRATION,
        "--compensate", "least_squares")  # fmt: skip
    again, swept = (load(tmp_path / name) for name in ("again", "out/ratio-0.3"))
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, swept(ids()).logits)


def test_the_command_searches_by_compensated_scores_unless_told_otherwise(workplace, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("saap.steps.ENOUGH", 0.0)  # any text will do
    plans = {}
    for choice in ("auto", "on", "off"):
        printed = prune(workplace, "--ratio", 0.4, "--out", tmp_path / choice, "--compensate", "least_squares",
                        "--compensated-scores", choice).stdout  # fmt: skip
        assert ("searched by compensated scores" in printed) == (choice != "off")
        plans[choice] = json.loads((tmp_path / choice / "saap_plan.json").read_text())
    assert plans["auto"]["layers"] == plans["on"]["layers"] != plans["off"]["layers"]
    assert [plans[each]["settings"].get("compensated_scores") for each in ("auto", "on", "off")] == [True, True, None]


def test_the_command_says_how_much_text_the_scores_are_of(workplace, tmp_path) -> None:  # noqa: F811
    done = prune(workplace, "--ratio", 0.4, "--out", tmp_path / "out", "--compensate", "least_squares")
    settings = json.loads((tmp_path / "out/saap_plan.json").read_text())["settings"]
    assert settings["compensated_scores"] is False and 0 < settings["tokens_per_input"] < 40
    assert (
        f"searched by plain scores: {settings['tokens_per_input']:g} tokens for every input, compensated ones take 40 "
        "(more --samples, or --compensated-scores on)"
    ) in " ".join(done.stdout.split())


def test_the_command_refuses_a_plan_without_text_before_work(workplace, tmp_path) -> None:  # noqa: F811
    saap.search(
        saap.score(saap.calibrate(saap.load(workplace / "dense"), data=ids(4, 16), samples=4, seq_len=16)), 0.2,
        multiple=8,
    ).save(tmp_path / "plan.json")  # fmt: skip
    refused = run(
        "prune", "./absent", "--plan", tmp_path / "plan.json", "--out", tmp_path / "o", "--compensate", "bias", code=2
    )
    assert "needs calibration text" in refused.stderr and "--data" in refused.stderr
    wrong = prune(workplace, "--ratio", 0.2, "--out", tmp_path / "o", "--compensate", "flap", code=2)
    assert "none" in wrong.stderr and "least_squares" in wrong.stderr
