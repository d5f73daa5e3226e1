"""What a target refuses before any work: options, sizes and models; and plans that were edited."""

import json
from dataclasses import replace

import pytest
import torch

import saap
from saap.plan import Plan
from saap.search import search
from saap.serving.targets import is_tied
from saap.units import Units, discover
from tests.saap.test_search import make_scores
from tests.saap.test_tensor_parallel import layer_of, random_scores
from tests.saap.tiny import FAMILIES, tiny_model
from tests.serving.test_targets import wide_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "llama.cpp", "multiple": 8}, "multiple=8 contradicts target='llama.cpp', .* multiples of 32"),
        ({"target": "edge", "multiple": 128}, "multiple=128 contradicts target='edge', .* multiples of 256"),
        ({"target": "gpu", "multiple": 192}, "multiple=192 contradicts target='gpu', .* multiples of 128"),
        ({"target": "vllm", "allow_empty": True}, "allow_empty=True contradicts target='vllm'"),
        ({"target": "llama.cpp", "protect": (1,)},
         "layer 1: target='llama.cpp' does not take 597 channels of a protected layer; expected a multiple of 32"),
        ({"target": "vllm", "tensor_parallel": 32}, "layer 0: tensor_parallel=32 cannot split 8 KV heads"),
        ({"target": "edge", "multiple": 1024}, "layer 0: target='edge' does not take 597 channels or any smaller size"),
        ({"target": "tpu"}, "target must be one of transformers, vllm, llama.cpp, edge, gpu; got 'tpu'"),
    ],
)  # fmt: skip
def test_what_contradicts_a_target_is_refused_before_calibration(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saap.prune(wide_model("llama"), data=iter(()), ratio=0.3, **options)


def test_widths_that_are_not_pruned_must_be_taken_as_they_are() -> None:
    message = "layer 0: target='llama.cpp' does not take 597 channels where only attention is pruned; expected a mul"
    with pytest.raises(ValueError, match=message):
        search(random_scores(discover(wide_model("llama"))), 0.1, target="llama.cpp", modules=("attention",))


def test_a_protected_attention_of_misaligned_heads_is_named() -> None:
    odd = tiny_model("mistral", torch.float32, num_attention_heads=6, num_key_value_heads=3, intermediate_size=96)
    message = (
        "layer 2: target='llama.cpp' does not take 3 KV heads with 2 query heads each of a protected layer; expected "
        r"query heads \* head_dim to be a multiple of 32, got 48"
    )
    with pytest.raises(ValueError, match=message):
        saap.prune(odd, data=iter(()), ratio=0.3, target="llama.cpp", protect=(-1,))


@pytest.mark.parametrize(
    ("family", "overrides", "options", "message"),
    [
        ("gemma2", {}, {"target": "llama.cpp"}, "takes llama, mistral, qwen2, qwen3, got gemma2: use target trans"),
        ("mixtral", {}, {"target": "edge"}, "takes no mixture of experts, got mixtral: use target transformers"),
        ("mixtral", {}, {"target": "vllm"}, "a mixtral with equally many experts of one width in all layers only"),
        ("qwen3", {"tie_word_embeddings": False}, {"target": "llama.cpp"},
         "a qwen3 whose head is not its input embedding with one size for all layers only: give uniform=True"),
        ("qwen3", {"attention_bias": True}, {"target": "llama.cpp"}, "a qwen3 without biases, got them in k, o, q, v"),
        ("llama", {"hidden_size": 48}, {"target": "llama.cpp"}, "multiples of 32, got hidden size 48: use a type with"),
        ("mistral", {"hidden_act": "gelu"}, {"target": "llama.cpp"}, "takes MLPs with silu or swish, got gelu: use"),
        ("qwen3", {}, {"target": "llama.cpp", "compensate": "bias"}, "compensate='bias' contradicts target="),
    ],
)  # fmt: skip
def test_models_that_a_target_cannot_take_are_refused_before_calibration(family, overrides, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        saap.prune(wide_model(family, **overrides), data=["text"], ratio=0.3, **options)


def test_an_untied_qwen3_of_one_size_is_taken() -> None:
    scores = random_scores(discover(wide_model("qwen3", tie_word_embeddings=False)))
    assert search(scores, 0.3, target="llama.cpp", uniform=True).uniform


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt"])  # whose learned positions count as outside too
@pytest.mark.parametrize("tied", [False, True])
def test_units_tell_whether_the_head_is_the_embedding(family: str, tied: bool) -> None:
    assert is_tied(discover(tiny_model(family, torch.float32, tie_word_embeddings=tied))) is tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels_kept": "0-40"}, "layer 1: target='llama.cpp' does not take 41 channels; expected a multiple of 32"),
        (
            {"kv_heads_kept": "0"},
            "layer 1: target='llama.cpp' does not take 1 KV heads with 2 query heads each; expected",
        ),
        ({"channels_kept": ""}, "layer 1: target='llama.cpp' does not take 0 channels; expected at least one channel"),
        (
            {"kv_heads_kept": ""},
            "layer 1: target='llama.cpp' does not take 0 KV heads .*; expected at least one KV head",
        ),
    ],
)
def test_an_edit_that_breaks_the_target_is_refused_on_loading(tmp_path, change: dict, message: str) -> None:
    plan = search(random_scores(discover(wide_model("llama"))), 0.3, target="llama.cpp")
    body = json.loads(plan.to_json())
    body["settings"]["allow_empty"] = True
    body["layers"][1] |= change
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan.json")
    body["settings"]["target"] = "abacus"
    with pytest.raises(ValueError, match="target must be one of"):
        Plan.from_json(json.dumps(body))
    del body["settings"]["target"]
    assert Plan.from_json(json.dumps(body)).layers[1] != plan.layers[1]


def test_a_plan_of_layers_that_differ_is_refused_where_one_size_is_needed() -> None:
    scores = random_scores(discover(wide_model("qwen3", tie_word_embeddings=False)))
    plan = search(scores, 0.3, multiple=32)
    assert not plan.uniform
    with pytest.raises(ValueError, match="target='llama.cpp' takes a qwen3 whose head is not its input embedding"):
        replace(plan, settings=plan.settings | {"target": "llama.cpp"})


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3", {}, "compensate='bias' contradicts target='llama.cpp', which takes a qwen3 without biases"),
        ("mistral", {"hidden_act": "gelu"}, "target='llama.cpp' takes MLPs with silu or swish, got gelu"),
    ],
)
def test_what_a_plan_of_sizes_cannot_know_is_checked_when_it_is_executed(family, overrides, message: str) -> None:
    model = wide_model(family, **overrides)
    plan = search(random_scores(discover(model)), 0.3, target="llama.cpp")
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        saap.compensation(model, plan, data=ids, method="bias", samples=4, seq_len=32)
    made = saap.compensation(model, replace(plan, settings={}), data=ids, method="bias", samples=4, seq_len=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        saap.compact(model, plan, made)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert saap.compact(model, replace(plan, settings={}), made) is model


def test_layers_without_attention_are_refused_where_a_target_needs_one() -> None:
    layers = (layer_of(4, 1, 64), layer_of(0, 0, 64))
    blocks = sum(layer.parameters(module) for layer in layers for module in ("attention", "mlp"))
    scores = make_scores(Units("llama", layers, blocks + 100, blocks, "0" * 16))
    with pytest.raises(ValueError, match="layer 1: target='vllm' does not take 0 KV heads .* at least one KV head in"):
        search(scores, 0.2, target="vllm")
    assert search(scores, 0.2, target="transformers").layers[1].kv_heads == ()
