"""What else is done to an accelerated model: moved, copied, trained, hooked, adapted, loaded into, evaluated."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

import saap
from saap.packed_linear import Packed
from saap.packed_mlp import GatedMLP
from saap_kernels import unpack
from tests.saap.test_accelerate import EVERYTHING, LAYERS, assert_same_state, calls_of, logits_of, make, state_of
from tests.saap.test_calibrate import token_ids
from tests.saap.test_checkpoint import ids
from tests.saap.tiny import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "phi3")  # with gate and up apart, and in one Linear
FP32 = {"rtol": 1e-5, "atol": 1e-5}  # the same products summed in another order
ALL = {"linear": LAYERS * 4, "gated_mlp": LAYERS}


def storages(model) -> int:
    """Bytes of all different storages that the model holds on to, packed weights included."""
    found = {}
    for module in model.modules():
        packed = [module.packed] if isinstance(module, Packed) else []
        packed += [module.gate_up] if isinstance(module, GatedMLP) else []
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in tensors + [t for p in packed for t in (p.data, p.scale, p.zero) if t is not None]:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def wide(family: str):
    """Wide enough that rows of padding are few."""
    return tiny_model(family, torch.float32, hidden_size=256, intermediate_size=768, head_dim=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_copy_of_the_weights_is_in_memory(family: str) -> None:
    model = wide(family) if family == "llama" else tiny_model(family, torch.float32, hidden_size=256)
    before = storages(model)
    handle = saap.accelerate(model, **EVERYTHING)
    # padding to 64 rows and columns
    assert before <= storages(model) <= 1.1 * before if family == "llama" else storages(model) <= 1.5 * before
    handle.undo()
    assert storages(model) == before


@pytest.mark.parametrize("offset", [0, 1])
def test_weights_that_lie_as_the_kernels_want_are_not_copied(offset: int) -> None:
    model = make("qwen2")
    q = model.model.layers[0].self_attn.q_proj
    q.weight.data = torch.empty(64 * 64 + offset)[offset:].view(64, 64).copy_(q.weight)
    address, before = q.weight.data_ptr(), logits_of(model)
    saap.accelerate(model, **EVERYTHING)
    assert (q.packed.data.data_ptr() == address) is (offset == 0)
    assert q.packed.data.data_ptr() % 64 == 0 and torch.equal(q.packed.data, q.weight)
    torch.testing.assert_close(logits_of(model), before, **FP32)


def test_quantised_weights_take_their_bits() -> None:
    model = wide("llama")
    weights = sum(p.nbytes for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    before = storages(model)
    for bits, share in ((8, 0.25), (4, 0.125)):
        with saap.accelerate(model, bits=bits, **EVERYTHING):
            # scale and zero, 8 bytes per 128 weights of 4 bytes, are a 64th more
            assert storages(model) <= before - weights * (1 - share - 1 / 64) + 1
            assert saap.cost.cost_of(model, 0).weight_bytes < before


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_accelerated_models_of_their_own(family: str, bits: int | None) -> None:
    model = make(family, "non-uniform")
    saap.accelerate(model, bits=bits, **EVERYTHING)
    size, wanted = storages(model), logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert storages(other) == size
        assert torch.equal(logits_of(other), wanted) and calls_of(other) == calls_of(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(logits_of(model), wanted) and not torch.equal(logits_of(other), wanted)
        other.saap_accelerated.undo()
        assert type(other.model.layers[0].mlp) is type(make(family).model.layers[0].mlp)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_dtype_reaches_the_packed_weights(family: str, bits: int | None) -> None:
    model, plain = make(family, "non-uniform"), make(family, "non-uniform", torch.float64)
    handle = saap.accelerate(model, bits=bits, **EVERYTHING)
    size, calls = storages(model), calls_of(model)
    model.to("cpu")
    assert storages(model) == size
    model.double()
    assert calls_of(model) == calls
    state = model.state_dict()
    assert all(tensor.dtype == torch.float64 for tensor in state.values())
    plain.load_state_dict(state)
    # held weights are unpacked in fp32, by the ops as for the state dict
    torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=1e-10, atol=1e-10)
    handle.undo()
    torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_up_follow_a_change_of_dtype_that_only_scales_see(family: str) -> None:
    model = make(family, "non-uniform")
    saap.accelerate(model, bits=8, **EVERYTHING)
    before = storages(model)
    model.half()
    assert storages(model) < before  # nothing of the wider scales is held on to
    for layer in model.model.layers:
        gate, up = unpack(layer.mlp.gate_up)
        assert torch.equal(torch.cat([gate, up]), torch.cat([w.unpacked_weight() for w in _gate_and_up(layer.mlp)]))


def _gate_and_up(mlp) -> list:
    return list(dict.fromkeys(mlp.linears()[:2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_trainable_weights(family: str) -> None:
    sizes = {"intermediate_size": 128}  # gate and up of one Linear are views only with whole lines of rows
    model, plain = (tiny_model(family, torch.float32, **sizes) for _ in range(2))
    saap.accelerate(model, **EVERYTHING)
    for each in (model.train(), plain.train()):
        each(ids(), labels=ids()).loss.backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, **FP32)
    optimisers = [torch.optim.SGD(each.parameters(), 0.01) for each in (model, plain)]
    for optimiser in optimisers:
        optimiser.step()
    torch.testing.assert_close(logits_of(model.eval()), logits_of(plain.eval()), rtol=1e-4, atol=1e-4)  # fp32
    assert calls_of(model) == ALL if family == "llama" else sum(calls_of(model).values())


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_frozen_weights_on_our_kernels(family: str, bits: int | None) -> None:
    """To the embeddings and to biases beside packed weights."""
    model, plain = make(family), make(family)
    saap.accelerate(model, bits=bits, **EVERYTHING)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("embed" in name or name.endswith("bias"))
        each(ids(), labels=ids()).loss.backward()
    wanted = dict(plain.named_parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-4, atol=1e-5)  # fp32 through three layers


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_inside_of_an_mlp_are_called(family: str, bits: int | None) -> None:
    model = make(family)
    saap.accelerate(model, bits=bits, **EVERYTHING)
    before = logits_of(model)
    down, shapes = model.model.layers[1].mlp.down_proj, []
    handle = down.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    torch.testing.assert_close(logits_of(model), before, **FP32)
    assert shapes == [(2, 10, 97)]
    handle.remove()
    assert torch.equal(logits_of(model), before) and len(shapes) == 1


def test_weights_that_are_exchanged_count() -> None:
    model = make("llama")
    saap.accelerate(model, **EVERYTHING)
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    plain = make("llama")
    for own, other in (
        (mlp.up_proj, plain.model.layers[1].mlp.up_proj),
        (attention.q_proj, plain.model.layers[1].self_attn.q_proj),
    ):
        own.weight = nn.Parameter(own.weight.detach() * 2)
        other.weight = nn.Parameter(other.weight.detach() * 2)
    mlp.gate_proj.double().float()
    torch.testing.assert_close(logits_of(model), logits_of(plain), **FP32)
    mlp.down_proj = nn.Linear(97, 64, dtype=torch.float32)
    plain.model.layers[1].mlp.down_proj = mlp.down_proj
    torch.testing.assert_close(logits_of(model), logits_of(plain), **FP32)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_into_shared_weights(assign: bool) -> None:
    model, other = make("llama"), make("llama", seed=5)
    saap.accelerate(model, **EVERYTHING)
    model.load_state_dict(state_of(other), assign=assign)
    torch.testing.assert_close(logits_of(model), logits_of(other), **FP32)


def test_a_state_dict_is_not_loaded_into_packed_weights() -> None:
    model = make("llama")
    saap.accelerate(model, bits=8, **EVERYTHING)
    state = state_of(model)
    with pytest.raises(
        RuntimeError, match=r"gate_proj.weight: the model is accelerated and holds packed weights; load before"
    ):
        model.load_state_dict(state)
    assert_same_state(model.state_dict(), state)


@pytest.mark.parametrize("bits", [None, 8])
def test_lora_learns_on_an_accelerated_model(bits: int | None) -> None:
    model = make("llama")
    saap.accelerate(model, bits=bits, **EVERYTHING)
    before = logits_of(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted(input_ids=ids(), labels=ids()).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert gradients and all("lora_" in name and grad.abs().max() > 0 for name, grad in gradients.items())
    with torch.no_grad():
        found = adapted(input_ids=ids(), use_cache=False).logits
    assert not torch.allclose(found, before, rtol=1e-3)
    if bits is None:
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(logits_of(merged), found, rtol=1e-4, atol=1e-4)  # fp32, summed otherwise
    else:
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
            adapted.merge_and_unload()


def test_evaluate_takes_accelerated_models_and_pruning_does_not() -> None:
    model, text = make("llama", "non-uniform"), ["the quick brown fox jumps over the lazy dog. " * 4]
    plain = saap.evaluate(model, tiny_tokenizer(), text)
    with saap.accelerate(model, bits=8, **EVERYTHING):
        found = saap.evaluate(model, tiny_tokenizer(), text)
        assert (found.parameters, found.macs_per_token) == (plain.parameters, plain.macs_per_token)
        assert found.weight_bytes < plain.weight_bytes
        assert found.loss == pytest.approx(plain.loss, rel=0.05) and found.loss != plain.loss
        with pytest.raises(ValueError, match="expected a plain model, got an accelerated one"):
            saap.calibrate(model, tiny_tokenizer(), token_ids(4), samples=4, seq_len=12)
