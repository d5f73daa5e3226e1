"""attach and finish: what learns by each method, what is left of it, and models and settings that do not fit."""

import copy
import sys

import pytest
import torch
from torch import nn

import saap
from saap.quantised_linear import QuantisedLinear
from saap.recovery.adapted_linear import AdaptedLinear
from saap.recovery.attach import attach, decoder_linears
from tests.recovery.adapted import IDS, adapted, logits, quantised, settings, stir, trained
from tests.saap.tiny import FAMILIES, tiny_model

FLOATS = [torch.float32, torch.bfloat16]


def learning(model) -> set[str]:
    return {name for name, each in model.named_parameters() if each.requires_grad}


def halves(model) -> dict[str, bool]:
    """Freezes some parameters and tells which: finishing has to bring exactly these back."""
    for index, each in enumerate(model.parameters()):
        each.requires_grad_(index % 2 == 0)
    return {name: each.requires_grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_groupwise_learns_by_adapters_and_norms_of_every_family(family, tmp_path) -> None:
    model = quantised(family)
    before, wanted = halves(model), logits(model)
    linears = {name for name, each in model.named_modules() if isinstance(each, QuantisedLinear)}
    attached = attach(model, settings())
    assert attached.model is model and torch.equal(logits(model), wanted)
    assert {name for name, each in model.named_modules() if isinstance(each, AdaptedLinear)} == linears
    norms = {name for name in learning(model) if "lora_" not in name}
    assert norms == {name for name, _ in model.named_parameters() if "norm" in name and name.endswith("weight")}
    losses = trained(model)
    assert losses[-1] < losses[0]
    wanted = logits(model)
    finished = attached.finish()
    assert torch.equal(logits(finished), wanted)
    assert {name: each.requires_grad for name, each in finished.named_parameters()} == before
    assert {type(finished.get_submodule(name)) for name in linears} == {QuantisedLinear}
    saap.save(finished, tmp_path / "out")
    assert torch.equal(logits(saap.load(tmp_path / "out")), wanted)


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits,group", [(4, 64), (8, 32), (8, 128)])
def test_groupwise_finishes_to_the_bit(bits, group, dtype, levels) -> None:
    attached, model = adapted("llama", bits, group, dtype, levels=levels, rank=1)
    wanted = logits(model)
    assert torch.equal(logits(attached.finish()), wanted)
    assert {each.dtype for each in model.parameters()} == {dtype}


def test_norms_are_learned_in_fp32_and_are_the_same_parameters_afterwards() -> None:
    model = quantised(dtype=torch.bfloat16)
    norm = model.model.norm
    weight, value = norm.weight, norm.weight.detach().clone()
    attached = attach(model, settings())
    (held,) = norm.parameters()
    assert held.dtype == torch.float32 and norm.weight.dtype == torch.bfloat16
    with torch.no_grad():
        held += 1e-6  # far below the last bit of bf16
    assert torch.equal(norm.weight, value) and not torch.equal(held.detach(), value.float())
    with torch.no_grad():
        held += 0.5
    wanted = norm.weight.detach().clone()
    attached.finish()
    assert norm.weight is weight and torch.equal(weight, wanted) and not torch.equal(weight, value)


def test_norms_stay_without_the_setting_and_the_seed_decides_the_draws() -> None:
    found = []
    for seed in (0, 0, 1):
        model = quantised()
        attach(model, settings(norms=False, seed=seed))
        assert all("lora_" in name for name in learning(model))
        found.append(torch.cat([each.flatten() for name, each in model.named_parameters() if "lora_" in name]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_discarding_gives_the_quantised_model_back() -> None:
    model = quantised()
    wanted = logits(model)
    attached = attach(model, settings(norms=False))
    stir(model)
    assert not torch.equal(logits(model), wanted)
    assert torch.equal(logits(attached.discard()), wanted)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe", "opt"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_lora_learns_in_all_linears_and_merges_into_plain_weights(bits, family, tmp_path) -> None:
    model = tiny_model(family, torch.float32) if bits is None else quantised(family, bits)
    before, wanted = halves(model), logits(model)
    targets = decoder_linears(model)
    attached = attach(model, settings(bits, method="lora", rank=4))
    assert torch.equal(logits(attached.model), wanted)
    found = learning(attached.model)
    assert all("lora_" in name for name in found) and len(found) == 2 * len(targets)
    losses = trained(attached.model)
    assert losses[-1] < losses[0]
    wanted = logits(attached.model)
    finished = attached.finish()
    assert finished is model and not any(isinstance(each, QuantisedLinear) for each in model.modules())
    torch.testing.assert_close(logits(finished), wanted, rtol=1e-4, atol=1e-4)  # products in another order, fp32
    assert all(each.requires_grad == before.get(name, True) for name, each in model.named_parameters())
    assert getattr(model.config, "quantization_config", None) is None
    saap.save(finished, tmp_path / "out")
    assert torch.equal(logits(saap.load(tmp_path / "out")), logits(finished))


def test_lora_draws_by_its_seed_and_leaves_the_generator_alone() -> None:
    found = []
    for seed in (0, 0, 1):
        model, state = tiny_model("llama", torch.float32), torch.get_rng_state()
        attached = attach(model, settings(None, method="lora", seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(
            torch.cat([each.flatten() for name, each in attached.model.named_parameters() if "lora_A" in name])
        )
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_lora_checkpoints_gradients_with_frozen_embeddings() -> None:
    attached = attach(quantised(), settings(method="lora"))
    stir(attached.model)
    attached.model.train()

    def gradients() -> list[torch.Tensor]:
        attached.model.zero_grad()
        attached.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [each.grad.clone() for each in attached.model.parameters() if each.requires_grad]

    wanted = gradients()
    attached.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(one, other) for one, other in zip(gradients(), wanted, strict=True))


def test_full_trains_everything_tied_weights_too() -> None:
    model = tiny_model("llama", torch.float32, tie_word_embeddings=True)
    before = halves(model)
    attached = attach(model, settings(None, method="full"))
    assert learning(model) == before.keys()
    losses = trained(model)
    assert losses[-1] < losses[0] and model.lm_head.weight is model.model.embed_tokens.weight
    assert attached.finish() is model
    assert {name: each.requires_grad for name, each in model.named_parameters()} == before


def test_pruned_models_with_layers_of_their_own_widths() -> None:
    model = tiny_model("llama", torch.float32)
    pruned = saap.prune(model, None, torch.randint(0, 64, (4, 12)), ratio=0.3, ratio_of="blocks", seq_len=12, samples=4)
    widths = {each.mlp.gate_proj.out_features for each in pruned.model.model.layers}
    assert len(widths) > 1
    attached = attach(saap.quantise(pruned.model, bits=4), settings(rank=4))
    trained(attached.model)
    wanted = logits(attached.model)
    assert torch.equal(logits(attached.finish()), wanted)


BAD = [
    (lambda: quantised(), settings(rank=65), "rank: expected at most 32, the smaller side of .*k_proj"),
    (
        lambda: quantised(),
        settings(rank=3, levels=False),
        r"at most 2, the groups of 32 in a row of .*\(64 x 64\), got 3",
    ),
    (lambda: quantised(bits=8), settings(4), "settings of int8 in groups of 32 .*, got int4 in groups of 32"),
    (lambda: quantised(group_size=64), settings(4), "settings of int4 in groups of 64 .*, got int4 in groups of 32"),
    (lambda: tiny_model("llama", torch.float32), settings(4), "call saap.quantise first"),
    (lambda: tiny_model("llama", torch.float32), settings(8, method="lora"), "call saap.quantise first"),
    (
        lambda: quantised(),
        settings(None, method="full"),
        "method full with bits None does not tune: give the model that",
    ),
    (lambda: quantised(), settings(None, method="lora"), "method lora with bits None does not tune: give bits 4"),
    (lambda: adapted()[1], settings(), "got one with PEFT adapters or group-wise ones"),
    (lambda: nn.Linear(2, 2), settings(), "expected a transformers PreTrainedModel"),
]


@pytest.mark.parametrize("make,chosen,message", BAD, ids=[each[2][:40] for each in BAD])
def test_what_does_not_fit_is_refused_before_anything_changes(make, chosen, message) -> None:
    model = make()
    classes = [type(each) for each in model.modules()]
    before, state = learning(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach(model, chosen)
    assert learning(model) == before and [type(each) for each in model.modules()] == classes
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())


def test_accelerated_models_are_refused() -> None:
    model = quantised()
    saap.accelerate(model, measure=False)
    with pytest.raises(ValueError, match="got an accelerated one"):
        attach(model, settings())


def test_models_with_adapters_are_refused_elsewhere(tmp_path) -> None:
    _, model = adapted()
    with pytest.raises(ValueError, match="merge or delete them first"):
        saap.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_peft_lora_says_what_to_install_and_groupwise_works(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_model("llama", torch.float32)
    before = learning(model)
    with pytest.raises(RuntimeError, match=r"pip install 'saap\[recover\]'"):
        attach(model, settings(None, method="lora"))
    assert learning(model) == before
    attach(quantised(), settings()).finish()


@pytest.mark.parametrize("method", ["lora", "groupwise"])
def test_a_finished_model_in_bf16_is_the_one_that_is_saved(method, tmp_path) -> None:
    attached = attach(quantised(dtype=torch.bfloat16), settings(method=method))
    stir(attached.model)
    finished = attached.finish().eval()
    saap.save(finished, tmp_path / "out")
    assert finished.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(logits(saap.load(tmp_path / "out")), logits(finished))


def test_lora_beside_quantised_weights_is_merged_before_it_is_rounded() -> None:
    attached = attach(quantised(dtype=torch.bfloat16), settings(method="lora"))
    stir(attached.model)
    layer = attached.model.get_base_model().model.layers[0].mlp.up_proj
    base, delta = layer.base_layer.unpacked_weight(), layer.get_delta_weight("default")
    assert delta.dtype == torch.float32  # factors are, too
    merged = attached.finish().model.layers[0].mlp.up_proj.weight
    assert torch.equal(merged, base + delta.to(base.dtype)) or torch.equal(
        merged, (base.float() + delta).to(base.dtype)
    )


def test_weights_written_out_leave_rotary_frequencies_in_fp32() -> None:
    model = quantised(dtype=torch.bfloat16)
    before = model.model.rotary_emb.inv_freq.clone()
    model.dequantize()
    assert model.dtype == torch.bfloat16 and torch.equal(model.model.rotary_emb.inv_freq, before)
