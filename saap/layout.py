"""How a pruned model is described: as a stock model of its family, or by the generic template."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from saap.families import PRUNED_PREFIX, Family, known_families, layers_of, linears_of
from saap.peft_targets import register_peft_targets
from saap.template import configuration_saap, modeling_saap
from saap.units import LayerUnits

LAYOUTS = ("auto", "stock", "template")
BIAS_ATTRIBUTES = {"attention_bias": "o", "mlp_bias": "down"}  # where a family's configuration has them


def register_template_classes() -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM load pruned checkpoints of every known family."""
    for name in known_families():
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or name not in MODEL_MAPPING_NAMES:
            continue  # registered by a user for a model class of their own
        causal = modeling_saap.model_class(f"Saap{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]}")
        base = modeling_saap.model_class(f"Saap{MODEL_MAPPING_NAMES[name]}")
        AutoConfig.register(f"{PRUNED_PREFIX}{name}", causal.config_class, exist_ok=True)
        AutoModel.register(causal.config_class, base, exist_ok=True)
        AutoModelForCausalLM.register(causal.config_class, causal, exist_ok=True)
    register_peft_targets()


def is_template(model: PreTrainedModel) -> bool:
    return str(getattr(model.config, "model_type", "")).startswith(PRUNED_PREFIX)


def describe_as_stock(config: PreTrainedConfig, family: Family, sizes: LayerUnits) -> PreTrainedConfig:
    """A stock configuration of the family with these sizes in every layer.

    Raises ValueError, saying why, when the family's configuration cannot express them.
    """
    values = _plain_values(config) | _attributes(config, family, sizes) | {"head_dim": sizes.head_dim}
    values |= {name: True for name, part in BIAS_ATTRIBUTES.items() if name in values and part in sizes.biases}
    stock: type[PreTrainedConfig] = getattr(transformers, type(config).__name__.removeprefix("Saap"))
    if family.kv_heads_attribute is None and sizes.query_heads * sizes.head_dim != sizes.hidden_size:
        raise ValueError(
            f"a stock {family.name} model derives its head size from hidden_size / heads; "
            f"{sizes.query_heads} heads of {sizes.head_dim} do not make {sizes.hidden_size}"
        )
    return _build(stock, values)


def biases_of_stock(config: PreTrainedConfig, family: Family, needed: Iterable[str]) -> tuple[str, ...]:
    """Parts whose Linear has a bias in a stock model of ``config``; raises ValueError unless all ``needed`` have."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    linears = linears_of(layers_of(model, family)[0], family)
    found = tuple(part for part, linear in linears.items() if linear.bias is not None)
    lacking = [part for part in needed if part not in found]
    if lacking:
        raise ValueError(f"a stock {family.name} model has no bias in {', '.join(lacking)}")
    return found


def describe_as_mistral(config: PreTrainedConfig, family: Family, sizes: LayerUnits) -> PreTrainedConfig:
    """The same architecture as a Llama without biases, in a configuration that takes any head count."""
    if family.name != "llama" or sizes.biases:
        raise ValueError("only a Llama without biases is also a stock Mistral")
    values = (
        _plain_values(config)
        | _attributes(config, family, sizes)
        | {"head_dim": sizes.head_dim, "sliding_window": None}
    )
    for name in ("attention_bias", "mlp_bias", "pretraining_tp", "architectures"):
        values.pop(name, None)
    return _build(transformers.MistralConfig, values)


def describe_as_template(
    config: PreTrainedConfig, family: Family, layers: tuple[LayerUnits, ...], causal: type[PreTrainedModel]
) -> PreTrainedConfig:
    """A template configuration: global values of the dense model, and each layer's own sizes."""
    config_name = type(config).__name__.removeprefix("Saap")
    causal_name = causal.__name__.removeprefix("Saap")
    values = _plain_values(config) | {"head_dim": layers[0].head_dim}
    values["auto_map"] = {
        "AutoConfig": f"configuration_saap.Saap{config_name}",
        "AutoModel": f"modeling_saap.Saap{MODEL_MAPPING_NAMES.get(family.name, causal_name)}",
        "AutoModelForCausalLM": f"modeling_saap.Saap{causal_name}",
    }
    values["saap_layout"] = {
        "layers": family.layers,
        "attention": family.attention,
        "projections": {part: family.path(part) for part in family.linear_parts},
        "query_heads": family.query_heads_attribute,
        "kv_heads": family.kv_heads_attribute,
        "intermediate_size": family.intermediate_size_attribute,
        "biases": [part for part in family.linear_parts if all(part in sizes.biases for sizes in layers)],
    }
    if family.experts is not None and family.experts_attribute is not None:
        count = _own_name(config, family.experts_attribute)
        values["saap_layout"] |= {"experts": count, "sparse_block": family.experts.rpartition(".")[0]}
        if len({sizes.experts for sizes in layers}) == 1:
            values[count] = layers[0].experts  # what is outside of the layers reads this
            if len({sizes.intermediate_size for sizes in layers}) == 1:
                values[family.intermediate_size_attribute] = layers[0].intermediate_size  # vLLM reads this one
        elif values.get("output_router_logits"):
            values["output_router_logits"] = False
            warnings.warn(
                "output_router_logits is switched off: transformers' balancing loss needs equally many experts in all "
                "layers, which this plan does not leave",
                stacklevel=2,
            )
    heads = {(sizes.query_heads, sizes.kv_heads) for sizes in layers}
    if len(heads) == 1 and family.kv_heads_attribute is not None:  # what caches for all layers at once read
        values |= dict(zip((family.query_heads_attribute, family.kv_heads_attribute), *heads, strict=True))
    described = configuration_saap.config_class(f"Saap{config_name}")(**values)
    described.per_layer_config = {index: _attributes(config, family, sizes) for index, sizes in enumerate(layers)}
    described.architectures = [f"Saap{causal_name}"]
    return described


def adopt(model: PreTrainedModel, family: Family, config: PreTrainedConfig) -> None:
    """Give a resized model its new configuration, and the class that goes with it."""
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    old = model.config
    template = str(config.model_type).startswith(PRUNED_PREFIX)
    for module in model.modules():
        own = getattr(module, "config", None)
        if getattr(own, "model_config", own) is old:  # itself, or the sized view of a template's module
            module.config = config  # type: ignore[assignment]
    if template:
        register_peft_targets()
    if template and not type(model).__name__.startswith("Saap"):
        model.__class__ = modeling_saap.model_class(f"Saap{type(model).__name__}")  # same layout, more methods
    if template:  # saved by its own names: those of the file that it came from are only known for stock models
        vars(model).pop("_weight_conversions", None)
        modeling_saap.share_config(model, layers_of(model, family), config)
    if family.experts_attribute is not None and hasattr(model, "num_experts"):  # of the loss that balances routers
        model.num_experts = vars(config)[_own_name(config, family.experts_attribute)]
    for layer, sizes in zip(layers_of(model, family), _sizes(config, family), strict=True):
        attention = layer.get_submodule(family.attention)
        modeling_saap.set_head_counts(attention, *sizes)
        if sizes[0] == 0:
            attention.forward = modeling_saap.NoAttention(attention, family.o.removeprefix(f"{family.attention}."))


def _build(kind: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    try:
        return kind(**values)
    except StrictDataclassError as error:
        raise ValueError(f"{kind.__name__} refuses these sizes: {error.__cause__ or error}") from error


def _sizes(config: PreTrainedConfig, family: Family) -> list[tuple[int, int]]:
    per_layer = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    kv_name = family.kv_heads_attribute or family.query_heads_attribute
    return [(getattr(c, family.query_heads_attribute), getattr(c, kv_name)) for c in per_layer]


def sizes_by_layer(config: PreTrainedConfig, family: Family) -> list[dict[str, int]]:
    """Of every layer what a configuration states: kv_heads, query_heads, intermediate_size, and experts of mixtures."""
    per_layer = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    heads = zip(_sizes(config, family), per_layer, strict=True)
    found = [
        {"kv_heads": kv, "query_heads": query, "intermediate_size": getattr(own, family.intermediate_size_attribute)}
        for (query, kv), own in heads
    ]
    if family.experts_attribute is not None:
        for sizes, own in zip(found, per_layer, strict=True):
            sizes["experts"] = getattr(own, _own_name(config, family.experts_attribute))
    return found


def _attributes(config: PreTrainedConfig, family: Family, sizes: LayerUnits) -> dict[str, int]:
    values = {
        family.query_heads_attribute: sizes.query_heads,
        family.intermediate_size_attribute: sizes.intermediate_size,
    }
    if family.kv_heads_attribute is not None:
        values[family.kv_heads_attribute] = sizes.kv_heads
    if family.experts_attribute is not None:
        values[_own_name(config, family.experts_attribute)] = sizes.experts
    return values


def _own_name(config: PreTrainedConfig, attribute: str) -> str:
    """The name that a configuration stores an attribute by; the others are read through it."""
    return str(config.attribute_map.get(attribute, attribute))


def _plain_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration's own values, global sizes included, without what a class or a layer adds."""
    plain = copy.copy(config)
    plain.__dict__.pop("_heterogeneity_spec", None)
    values = plain.to_dict()
    for name in ("model_type", "auto_map", "saap_layout", "per_layer_config", "transformers_version", "_name_or_path"):
        values.pop(name, None)
    return values
