"""Inputs that pruning would silently damage, refused by name before any work starts."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saap.experts import expert_tensors
from saap.families import Family, family_named, is_mixture, known_families, layers_of, projections_by_linear
from saap.host import on_host
from saap.packed_mlp import is_accelerated
from saap.quantised_linear import is_quantised


def refuse_unsupported(model: PreTrainedModel, *, accelerated: bool = False, quantised: bool | None = None) -> None:
    """Raise ValueError for models whose weights or structure SAAP cannot prune.

    ``accelerated`` lets those pass that ``accelerate`` has changed, ``quantised`` (None: as ``accelerated``) those that
    saap has quantised: what only reads a model can read them.
    """
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        if hasattr(model, "peft_config"):
            raise ValueError(f"expected a plain model, got a PEFT-wrapped one ({kind}); call merge_and_unload() first")
        raise ValueError(f"expected a transformers PreTrainedModel, got {kind}")
    if not accelerated and is_accelerated(model):
        raise ValueError("expected a plain model, got an accelerated one; call undo() of what accelerate() returned")
    ours = is_quantised(model)
    if ours and not (accelerated if quantised is None else quantised):
        raise ValueError("expected 16- or 32-bit weights, got a model quantised by saap; use the one it was made from")
    config = model.config
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "expected a plain model, got one with PEFT adapters or group-wise ones; merge or delete them first"
        )
    described = getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None) is not None
    if described and not ours:
        raise ValueError("expected 16- or 32-bit weights, got a quantised model; load it without quantization_config")
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if any(vars(config).get(name) for name in experts) and not is_mixture(model):
        known = ", ".join(name for name in known_families() if family_named(name).experts)
        raise ValueError(
            f"of mixture-of-experts models {known} are supported, without shared experts; got {config.model_type!r}"
        )
    if any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        raise ValueError(f"multimodal models are not supported; got {config.model_type!r}: pass its language model")
    if model.get_output_embeddings() is None:
        raise ValueError(f"expected a causal language model with an output head, got {type(model).__name__}")


def refuse_meta(model: PreTrainedModel) -> None:
    """Raise ValueError for weights that are not in memory."""
    meta = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if meta is not None:
        raise ValueError(f"model: expected weights in memory, got {meta} on the meta device")


def refuse_nonfinite_weights(model: PreTrainedModel, family: Family) -> None:
    """Raise ValueError naming the first prunable weight, embedding or head that holds NaN or inf."""
    for index, layer in enumerate(layers_of(model, family)):
        refuse_nonfinite_layer(layer, family, index)
    refuse_nonfinite_embeddings(model)


def refuse_nonfinite_layer(layer: nn.Module, family: Family, index: int) -> None:
    """As ``refuse_nonfinite_weights``, of one decoder layer."""
    prefix, linears = f"{family.layers}.{index}", projections_by_linear(layer, family).items()
    modules: dict[str, nn.Module] = {f"{prefix}.{family.path(next(iter(parts)))}": linear for linear, parts in linears}
    named = _named(modules) + [(f"{prefix}.{name}", tensor) for name, tensor in expert_tensors(layer, family).items()]
    _refuse_nonfinite(named)


def refuse_nonfinite_embeddings(model: PreTrainedModel) -> None:
    """As ``refuse_nonfinite_weights``, of the embeddings and the head."""
    modules = {"input embeddings": model.get_input_embeddings(), "output embeddings": model.get_output_embeddings()}
    _refuse_nonfinite(_named(modules))


def _named(modules: dict[str, nn.Module]) -> list[tuple[str, Tensor]]:
    return [
        (f"{name}.{kind}", weight)
        for name, module in modules.items()
        for kind, weight in module.named_parameters(recurse=False)
    ]


@torch.no_grad()
def _refuse_nonfinite(named: list[tuple[str, Tensor]]) -> None:
    # a finite sum is one pass without a copy; only a suspicious one needs the full test
    totals = on_host([weight.sum(dtype=torch.float32) for _, weight in named])
    for (name, weight), total in zip(named, totals, strict=True):
        if not torch.isfinite(total) and not torch.isfinite(weight).all():
            raise ValueError(f"expected finite weights, found NaN or inf in {name}")
