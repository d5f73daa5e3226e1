"""What cannot run on our kernels stays as it is, and what cannot be accelerated is refused before anything changes."""

from importlib import import_module

import pytest
import torch
from torch import nn

import saap
from saap.kernel_choice import Timing
from saap.packed_linear import HeldLinear
from saap.packed_mlp import is_accelerated
from saap_kernels import pack
from tests.saap.test_accelerate import EVERYTHING, LAYERS, assert_same_state, calls_of, logits_of, make, state_of
from tests.saap.test_empty_modules import hollow
from tests.saap.tiny import DENSE

module = import_module("saap.accelerate")  # the package's attribute of that name is the function


@pytest.mark.parametrize("family", DENSE)
def test_empty_modules_are_left_alone(family: str) -> None:
    model = hollow(family, torch.float32)
    before = logits_of(model)
    handle = saap.accelerate(model, **EVERYTHING)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-5)  # fp32, other sums
    assert {each.reason for each in handle.report if not each.replaced} == {"nothing is left of it"}


def other_activation(model) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def other_forward(model) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = type(mlp).forward.__get__(mlp)


def other_function(model) -> None:
    class Doubled(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mlp.__class__ = Doubled


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_activation, "an activation that the kernels do not have: ReLU"),
        (other_forward, "has a forward of its own"),
        (other_function, r"Doubled computes something else than down(act(gate(x)) * up(x))"),
    ],
)
def test_mlps_that_the_kernel_cannot_stand_for_keep_their_forward(change, reason: str) -> None:
    model = make("llama")
    change(model)
    before = logits_of(model)
    handle = saap.accelerate(model, **EVERYTHING)
    assert [(each.name, each.reason) for each in handle.report if not each.replaced] == [("model.layers.0.mlp", reason)]
    assert calls_of(model) == {"linear": LAYERS * 4 + 3, "gated_mlp": LAYERS - 1}
    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-5)  # fp32, other sums
    assert f"left alone, 1: {reason}" in str(handle)


def test_linears_that_are_more_than_a_linear_are_left_alone() -> None:
    model = make("llama")
    attention = model.model.layers[1].self_attn
    nn.utils.parametrizations.weight_norm(attention.q_proj)
    attention.v_proj.weight = attention.k_proj.weight
    attention.o_proj.forward = attention.o_proj.forward
    before = logits_of(model)
    handle = saap.accelerate(model, bits=8, **EVERYTHING)
    found = {each.name.rpartition(".")[2]: each.reason for each in handle.report if not each.replaced}
    tied = "its weight is tied to another module's"
    assert found == {
        "q_proj": "a ParametrizedLinear, not an nn.Linear", "k_proj": tied, "v_proj": tied,
        "o_proj": "has a forward of its own",
    }  # fmt: skip
    # 8 bits: half of 255 steps of the range of 64 weights of std 0.15, in a model of logits of some units
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head_on_request(tied: bool) -> None:
    model = make("llama", tie_word_embeddings=tied)
    assert saap.accelerate(model, bits=8, **EVERYTHING).report[-1].name != "lm_head"
    model.saap_accelerated.undo()
    handle = saap.accelerate(model, bits=8, lm_head=True, **EVERYTHING)
    head = handle.report[-1]
    assert (head.name, head.replaced) == ("lm_head", not tied)
    assert isinstance(model.lm_head, HeldLinear) is not tied
    assert saap.discover(model, accelerated=True).head_parameters == 64 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits: expected None, 8 or 4, got 3"),
        ({"bits": 16}, "bits: expected None, 8 or 4, got 16"),
        ({"group_size": 64}, "group_size: expected None unless bits is given, got 64"),
        ({"bits": 4, "group_size": 48}, "group_size: expected a positive multiple of 32, got 48"),
        ({"keep_weights": True}, "keep_weights: expected False unless bits is given"),
    ],
)
def test_bad_arguments_change_nothing(options: dict[str, object], message: str) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match=message):
        saap.accelerate(model, **options, **EVERYTHING)
    assert not is_accelerated(model)


def unknown(model) -> None:
    model.config.model_type = "gpt_of_tomorrow"


def on_meta(model) -> None:
    model.model.layers[2].mlp.down_proj.to("meta")


def not_finite(model) -> None:
    model.model.layers[2].mlp.down_proj.weight.data[3, 4] = torch.inf


def accelerated(model) -> None:
    saap.accelerate(model, **EVERYTHING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown, "unknown model family 'gpt_of_tomorrow'; known: gemma2, llama"),
        (on_meta, r"weights in memory, got model.layers.2.mlp.down_proj.weight on the meta device"),
        (not_finite, "NaN or inf in model.layers.2.mlp.down_proj.weight"),
        (accelerated, r"expected a plain model, got an accelerated one; call undo\(\)"),
    ],
)
def test_bad_models_are_refused_before_anything_changes(change, message: str) -> None:
    model = make("llama")
    change(model)
    classes = [type(each) for each in model.modules()]
    with pytest.raises(ValueError, match=message):
        saap.accelerate(model, bits=8, **EVERYTHING)
    assert [type(each) for each in model.modules()] == classes
    with pytest.raises(ValueError, match="expected a transformers PreTrainedModel, got Linear"):
        saap.accelerate(nn.Linear(3, 4))


def test_what_fails_half_way_is_taken_back(monkeypatch) -> None:
    model = make("llama")
    state, calls = state_of(model), []

    def pack_twice(weight, **options):
        calls.append(weight)
        if len(calls) > 9:
            raise MemoryError("no more")
        return pack(weight, **options)

    monkeypatch.setattr(module, "pack", pack_twice)
    with pytest.raises(MemoryError):
        saap.accelerate(model, bits=8, keep_weights=True, **EVERYTHING)
    assert not is_accelerated(model)
    assert_same_state(model.state_dict(), state)


def test_only_what_is_measured_faster_is_replaced(monkeypatch) -> None:
    asked = []

    def timing(shape, bits, dtype, device, tokens=1):
        asked.append((shape, bits, dtype))
        return Timing(1.0, 0.5 if shape[0] == 64 else 1.0)

    monkeypatch.setattr(module, "timing", timing)
    model = make("llama")
    handle = saap.accelerate(model, bits=8)
    layer = {each.name.removeprefix("model.layers.0."): each.replaced for each in handle.report[:8]}
    assert layer == {
        "mlp": False, "self_attn.q_proj": True, "self_attn.k_proj": False, "self_attn.v_proj": False,
        "self_attn.o_proj": True, "mlp.gate_proj": False, "mlp.up_proj": False, "mlp.down_proj": True,
    }  # fmt: skip
    assert ((97, 64, 64), 8, torch.float32) in asked and ((32, 64), 8, torch.float32) in asked
    assert calls_of(model) == {"linear": 3 * LAYERS, "gated_mlp": 0}
