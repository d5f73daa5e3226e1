"""Where each model family keeps the weights that pruning removes: families are data, not code."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

PRUNED_PREFIX = "saap_"


@dataclass(frozen=True)
class Family:
    """Names of one family's prunable projections and of the config attributes that size them.

    Projection paths are relative to a decoder layer. ``gate`` is None for ungated MLPs.
    ``kv_heads_attribute`` is None for families without grouped-query attention.
    """

    name: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    query_heads_attribute: str = "num_attention_heads"
    kv_heads_attribute: str | None = "num_key_value_heads"
    intermediate_size_attribute: str = "intermediate_size"

    @property
    def attention_parts(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o")

    @property
    def mlp_parts(self) -> tuple[str, ...]:
        return ("up", "down") if self.gate is None else ("gate", "up", "down")

    @property
    def parts(self) -> tuple[str, ...]:
        return self.attention_parts + self.mlp_parts

    def path(self, part: str) -> str:
        """Path of a part's Linear relative to its decoder layer."""
        return getattr(self, part)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to ``discover``; its name is the config's ``model_type``."""
    if family.name.startswith(PRUNED_PREFIX):
        raise ValueError(
            f"family names must not start with {PRUNED_PREFIX!r} (kept for pruned checkpoints); got {family.name!r}"
        )
    _FAMILIES[family.name] = family


for _family in (
    Family("llama"),
    Family("mistral"),
    Family("qwen2"),
    Family(
        "opt",
        layers="model.decoder.layers",
        o="self_attn.out_proj",
        gate=None,
        up="fc1",
        down="fc2",
        kv_heads_attribute=None,
        intermediate_size_attribute="ffn_dim",
    ),
):
    register_family(_family)


def known_families() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def family_of(model: PreTrainedModel, name: str | None = None) -> Family:
    """Return the family row of a model, by ``name`` or by its config's ``model_type``.

    Raises ValueError naming the known families when the model's is not among them.
    """
    wanted = str(name or getattr(model.config, "model_type", type(model).__name__))
    wanted = wanted.removeprefix(PRUNED_PREFIX)
    if wanted not in _FAMILIES:
        raise ValueError(
            f"unknown model family {wanted!r}; known: {', '.join(known_families())}. "
            "Describe another one with saap.register_family(saap.Family(...))."
        )
    return _FAMILIES[wanted]


def layers_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The model's decoder layers."""
    return model.get_submodule(family.layers)  # type: ignore[return-value]  # a path to a ModuleList by definition of the row


def linears_of(layer: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """{part: Linear} of one decoder layer, parts in the family's order."""
    return {part: layer.get_submodule(family.path(part)) for part in family.parts}  # type: ignore[misc]
