"""Discovery: sizes from weights, unit index lists, fingerprints, and models that are refused."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from saap.families import _FAMILIES, Family, family_of, known_families, layers_of, projections_of, register_family
from saap.refuse import refuse_nonfinite_weights
from saap.units import Units, discover
from tests.saap.tiny import DENSE, tiny_model


@pytest.mark.parametrize("name", DENSE)
def test_every_prunable_weight_belongs_to_exactly_one_unit(name: str) -> None:
    model = tiny_model(name)
    units = discover(model)
    assert units.family == name and name in known_families()
    row = family_of(model)
    for index, layer in enumerate(layers_of(model, row)):
        projections = projections_of(layer, row)
        counts = {part: torch.zeros_like(p.weight) for part, p in projections.items()}
        for module in ("attention", "mlp"):
            removable = 0
            for unit in range(units.layers[index].count(module)):
                for part, (axis, where) in units.indices(index, module, unit).items():
                    rows = list(where)
                    if axis == "out":
                        counts[part][rows] += 1
                        removable += projections[part].weight[rows].numel()
                        removable += len(rows) if projections[part].bias is not None else 0
                    else:
                        counts[part][:, rows] += 1
                        removable += projections[part].weight[:, rows].numel()
            assert removable == units.layers[index].parameters(module)
        assert all((count == 1).all() for count in counts.values())


def test_grouped_query_attention_units_hold_contiguous_query_heads() -> None:
    units = discover(tiny_model("llama"))
    owned = units.indices(1, "attention", 2)
    layer = units.layers[1]
    assert layer.query_heads == 8 and layer.kv_heads == 4
    assert owned["q"] == owned["q"][:1] + (range(4 * layer.head_dim, 6 * layer.head_dim),)
    assert owned["k"][1] == range(2 * layer.head_dim, 3 * layer.head_dim)
    assert owned["o"][0] == "in" and list(owned["o"][1]) == list(owned["q"][1])


def test_parameters_count_tied_tensors_once() -> None:
    tied = discover(tiny_model("llama", tie_word_embeddings=True))
    untied = discover(tiny_model("llama", tie_word_embeddings=False))
    model = tiny_model("llama", tie_word_embeddings=True)
    assert untied.total_parameters - tied.total_parameters == model.get_input_embeddings().weight.numel()
    assert tied.block_parameters == untied.block_parameters


def test_units_round_trip_through_json() -> None:
    units = discover(tiny_model("opt"))
    assert Units.from_json(units.to_json()) == units


def test_fingerprint_ignores_dtype_but_not_weights() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    before = discover(model).fingerprint
    assert discover(tiny_model("llama", dtype=torch.float32)).fingerprint == before
    assert discover(model.to(torch.bfloat16)).fingerprint == before
    assert discover(tiny_model("llama", dtype=torch.float32, seed=1)).fingerprint != before


def test_unknown_family_lists_the_known() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    known = "gemma2, llama, mistral, mixtral, opt, phi3, qwen2, qwen3, qwen3_moe"
    with pytest.raises(ValueError, match=f"unknown model family 'gpt2'; known: {known}"):
        discover(model)


def test_a_registered_family_is_discovered(monkeypatch) -> None:
    monkeypatch.setattr("saap.families._FAMILIES", dict(_FAMILIES))
    register_family(Family("llama_like"))
    assert discover(tiny_model("llama"), family="llama_like").family == "llama_like"
    with pytest.raises(ValueError, match="must not start with 'saap_'"):
        register_family(Family("saap_llama"))


def test_quantised_multimodal_headless_and_foreign_models_are_refused() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="got a quantised model"):
        discover(model)
    model = tiny_model("llama")
    model.config.vision_config = {}
    with pytest.raises(ValueError, match="multimodal models are not supported"):
        discover(model)
    with pytest.raises(ValueError, match="expected a causal language model with an output head"):
        discover(AutoModel.from_config(tiny_model("llama").config))
    with pytest.raises(ValueError, match="expected a transformers PreTrainedModel, got Linear"):
        discover(nn.Linear(2, 2))
    bert = BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
    )
    with pytest.raises(ValueError, match="unknown model family 'bert'"):
        discover(bert)


def test_peft_wrapped_models_are_refused() -> None:
    peft = pytest.importorskip("peft", reason="peft is an optional extra")
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="PEFT-wrapped"):
        discover(wrapped)
    with pytest.raises(ValueError, match="PEFT adapters"):
        discover(wrapped.get_base_model())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_name_the_layer(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[1, 3] = value
    with pytest.raises(ValueError, match="NaN or inf in model.layers.2.mlp.down_proj.weight"):
        refuse_nonfinite_weights(model, family_of(model))
