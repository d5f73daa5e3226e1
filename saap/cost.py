"""What a model costs to store and to run, counted from its weights."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from saap.packed_linear import held_bytes, held_elements
from saap.units import discover


@dataclass(frozen=True)
class Cost:
    """Static costs of one model; tied tensors count once."""

    parameters: int
    macs_per_token: int
    weight_bytes: int
    kv_cache_bytes_per_token: int


def cost_of(model: PreTrainedModel, context: int) -> Cost:
    """Count parameters, multiply-accumulates per generated token, and bytes.

    MACs: one per weight of every Linear, the output head included, of the routers and of the experts that one
    token goes through, plus 2 * query_heads * head_dim *
    ``context`` per layer for the two attention products with ``context`` cached tokens. KV cache: keys
    and values of every layer's own KV heads, in the model's dtype.
    """
    layers = discover(model, accelerated=True).layers
    linear = sum(
        module.in_features * module.out_features for module in model.modules() if isinstance(module, nn.Linear)
    )
    linear += sum(
        layer.router_weights + layer.experts_per_token * layer.intermediate_size * layer.unit_weights("mlp")
        for layer in layers
    )
    attention = sum(2 * layer.query_heads * layer.head_dim * context for layer in layers)
    parameters = list(model.parameters())
    return Cost(
        parameters=sum(p.numel() for p in parameters) + held_elements(model),
        macs_per_token=linear + attention,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters) + held_bytes(model),
        kv_cache_bytes_per_token=sum(2 * layer.kv_heads * layer.head_dim for layer in layers) * model.dtype.itemsize,
    )
