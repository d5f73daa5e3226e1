"""Adapted Linears: the base at the start, merged and unmerged to the bit, gradients, state and dtypes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saap.quantised_linear import QuantisedLinear
from saap.recovery.adapted_linear import AdaptedLinear, adapted_linears, merge_adapters, new_factors, unmerge_adapters
from saap.stored_weight import NAMES
from saap_kernels import pack
from tests.recovery.adapted import IDS, adapted, logits, trained

SHAPE = (97, 70)  # odd, with a tail group whatever the group size


def base(bits=4, group=32, dtype=torch.float32, shape=SHAPE) -> QuantisedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], dtype=dtype)
    QuantisedLinear.convert(linear, pack(linear.weight, bits=bits, group_size=group))
    return linear.requires_grad_(False)  # type: ignore[return-value]  # of this class from here on


def made(bits=4, group=32, dtype=torch.float32, levels=True, stirred=True) -> AdaptedLinear:
    linear = base(bits, group, dtype)
    AdaptedLinear.adapt(linear, new_factors(linear, 4, 16.0, levels, torch.Generator().manual_seed(0)))
    if stirred:
        for name in ("lora_zero_b", "lora_level_v"):
            if getattr(linear, name) is not None:
                nn.init.normal_(getattr(linear, name), std=0.05)
    return linear


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_it_begins_as_the_base_and_its_state_holds_the_base(bits, levels) -> None:
    linear, plain, x = made(bits, levels=levels, stirred=False).eval(), base(bits), torch.randn(5, SHAPE[1])
    assert torch.equal(linear(x), plain(x))
    state = linear.state_dict()
    assert same({name: state.pop(name) for name in (*NAMES, "bias")}, plain.state_dict())
    wanted = {"lora_zero_a": (3, 3), "lora_zero_b": (97, 3)}  # a rank of 4 in 3 groups
    wanted |= {"lora_level_u": (4, 70), "lora_level_v": (97, 4)} if levels else {}
    assert {name: tuple(each.shape) for name, each in state.items()} == wanted
    assert {name for name, each in linear.named_parameters() if each.requires_grad} == wanted.keys()


@pytest.mark.parametrize("tokens", [1, 5, 300])  # both paths of the product
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_merging_and_unmerging_are_exact(bits, group, dtype, levels, tokens) -> None:
    linear, x = made(bits, group, dtype, levels).eval(), torch.randn(tokens, SHAPE[1], dtype=dtype)
    before, found, plain = copy.deepcopy(linear.state_dict()), linear(x), base(bits, group, dtype)
    assert not torch.equal(found, plain(x))
    linear.merge()
    linear.merge()  # once is enough
    assert torch.equal(linear(x), found) and torch.equal(linear.qzero, linear.base_qzero) is False
    assert same(linear.state_dict(), before)  # of the base, whether merged or not
    linear.unmerge()
    assert torch.equal(linear(x), found) and same(linear.state_dict(), before)
    assert all(torch.equal(getattr(linear, name), getattr(plain, name)) for name in NAMES)
    linear.give_up()
    assert type(linear) is QuantisedLinear and torch.equal(linear(x), found)
    assert linear.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(linear.qweight, plain.qweight) is not levels


def test_giving_up_without_merging_leaves_the_base() -> None:
    linear, plain = made(), base()
    linear.merge()
    linear.give_up(merge=False)
    assert type(linear) is QuantisedLinear and same(linear.state_dict(), plain.state_dict())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_the_dense_straight_through_formula(bits, levels, train) -> None:
    linear = made(bits, levels=levels).train(train)
    x = torch.randn(2, 150, SHAPE[1], requires_grad=True)
    learned = [x, *(each for each in linear.parameters() if each.requires_grad)]
    found = linear(x)
    dy = torch.randn_like(found)
    mine = torch.autograd.grad(found, learned, dy)
    linear.merge()
    f = linear.factors
    change = (f.scaling * f.b @ f.a).repeat_interleave(32, 1)[:, : SHAPE[1]]
    if levels:
        change = change + f.scaling * f.v @ f.u
    weight = linear.unpacked_weight() + change - change.detach()
    dense = F.linear(x, weight, linear.bias)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)  # fp32 sums of 70
    for one, other in zip(mine, torch.autograd.grad(dense, learned, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))  # fp32 sums of 300


def test_training_multiplies_with_the_levels_that_merging_leaves() -> None:
    linear, x = made(), torch.eye(SHAPE[1])  # products with it are the weight itself
    written = linear.train()(x) - linear.bias
    linear.merge()
    torch.testing.assert_close(written.T, linear.unpacked_weight(), rtol=0, atol=1e-6)  # of steps of about 0.01


def test_factors_stay_in_fp32_and_a_change_of_dtype_reaches_the_rest() -> None:
    linear = made().bfloat16()
    assert {each.dtype for each in (linear.qscale, linear.qzero, linear.bias)} == {torch.bfloat16}
    assert {each.dtype for name, each in linear.named_parameters() if "lora_" in name} == {torch.float32}
    found = linear.eval()(torch.randn(3, SHAPE[1], dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16


def test_autocast_rounds_no_factor() -> None:
    linear, x = made().train(), torch.randn(150, SHAPE[1])
    wanted = linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), wanted)
        linear(x).sum().backward()
    found = {name: each.grad.clone() for name, each in linear.named_parameters() if each.requires_grad}
    linear.zero_grad()
    linear(x).sum().backward()
    assert all(torch.equal(each.grad, found[name]) for name, each in linear.named_parameters() if each.requires_grad)


def test_state_is_not_loaded_into_merged_adapters() -> None:
    linear = made()
    state = copy.deepcopy(linear.state_dict())
    other = made(stirred=False)
    other.load_state_dict(state)
    assert same(other.state_dict(), state)
    other.merge()
    with pytest.raises(RuntimeError, match="load after unmerge_adapters"):
        other.load_state_dict(state)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3_moe", "opt"])
def test_models_merge_and_unmerge_to_the_bit(family) -> None:
    _, model = adapted(family)
    before, found = copy.deepcopy(model.state_dict()), logits(model)
    merge_adapters(model)
    assert torch.equal(logits(model), found)
    moved = [name for name, each in adapted_linears(model) if not torch.equal(each.qweight, each.base_qweight)]
    assert len(moved) == len(list(adapted_linears(model)))
    unmerge_adapters(model)
    assert torch.equal(logits(model), found) and same(model.state_dict(), before)


@pytest.mark.parametrize("levels", [False, True])
def test_gradient_checkpointing_changes_no_gradient(levels) -> None:
    _, model = adapted(levels=levels)
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [each.grad.clone() for each in model.parameters() if each.requires_grad]

    wanted = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    found = gradients()
    hook.remove()
    assert len(calls) == 2  # once more in the backward pass
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_training_lowers_the_loss_and_moves_what_learns_only() -> None:
    _, model = adapted()
    frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    losses = trained(model, 6)
    assert losses[-1] < 0.8 * losses[0]
    assert frozen and all(torch.equal(each, frozen[name]) for name, each in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("factor", ["lora_zero_a", "lora_level_v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_named_and_nothing_is_merged(factor, value) -> None:
    attached, model = adapted()
    name, last = list(adapted_linears(model))[-1]
    with torch.no_grad():
        getattr(last, factor)[0, 0] = value
    for merge in (attached.finish, lambda: merge_adapters(model)):
        with pytest.raises(ValueError, match=f"{name}.{factor}: expected finite values to merge"):
            merge()
    assert not any(each.is_merged for _, each in adapted_linears(model))
    assert not list(adapted_linears(attached.discard()))
