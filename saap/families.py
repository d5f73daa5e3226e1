"""Where each model family keeps the weights that pruning removes: families are data, not code."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from saap.packed_linear import weight_of

PRUNED_PREFIX = "saap_"


@dataclass(frozen=True)
class Family:
    """Names of one family's prunable projections and of the config attributes that size them.

    Projection paths are relative to a decoder layer. Parts with the same path are consecutive rows of one
    fused Linear, in the order of ``parts``. ``gate`` is None for ungated MLPs. ``kv_heads_attribute`` is
    None for families without grouped-query attention. In a mixture of experts ``experts`` is the module that
    holds gate and up, and down, of all experts as two 3-D tensors, ``router`` the one that weighs them, and
    ``experts_attribute`` how many there are; the paths of gate, up and down then mean nothing (``saap.experts``).
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
    experts: str | None = None
    router: str | None = None
    experts_attribute: str | None = None

    @property
    def attention_parts(self) -> tuple[str, ...]:
        return ("q", "k", "v", "o")

    @property
    def mlp_parts(self) -> tuple[str, ...]:
        return ("up", "down") if self.gate is None else ("gate", "up", "down")

    @property
    def parts(self) -> tuple[str, ...]:
        return self.attention_parts + self.mlp_parts

    @property
    def linear_parts(self) -> tuple[str, ...]:
        """Parts that are a Linear, or rows of one; those of experts are not."""
        return self.attention_parts if self.experts else self.parts

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


_EXPERTS: dict[str, str] = {"experts": "mlp.experts", "router": "mlp.gate"}

for _family in (
    Family("llama"),
    Family("mistral"),
    Family("qwen2"),
    Family("qwen3"),
    Family("gemma2"),
    Family(
        "phi3",
        q="self_attn.qkv_proj",
        k="self_attn.qkv_proj",
        v="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
    ),
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
    Family("mixtral", **_EXPERTS, experts_attribute="num_local_experts"),
    Family(
        "qwen3_moe",
        **_EXPERTS,
        experts_attribute="num_experts",
        intermediate_size_attribute="moe_intermediate_size",
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


def family_named(name: str) -> Family:
    """The row of a known family."""
    return _FAMILIES[name]


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether the model is of a known family with experts."""
    row = _FAMILIES.get(str(getattr(model.config, "model_type", "")).removeprefix(PRUNED_PREFIX))
    return row is not None and row.experts is not None


def layers_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The model's decoder layers."""
    return model.get_submodule(family.layers)  # type: ignore[return-value]  # a path to a ModuleList by definition of the row


def linears_of(layer: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """{part: Linear} of one decoder layer, parts in the family's order; fused parts share one, experts have none."""
    return {part: layer.get_submodule(family.path(part)) for part in family.linear_parts}  # type: ignore[misc]  # a row names Linears


@dataclass(frozen=True)
class Projection:
    """One part of a decoder layer: rows ``start`` to ``stop`` of a Linear, all of them unless it is fused.

    ``linear`` is an nn.Linear or, for one expert, an ``saap.experts.ExpertLinear``.
    """

    linear: Any
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), a view of the Linear's own weight as it is now; a copy if it is held packed."""
        return weight_of(self.linear)[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """(out_features,), a view, or None."""
        return None if self.linear.bias is None else self.linear.bias[self.rows]

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.stop - self.start


def projections_of(layer: nn.Module, family: Family) -> dict[str, Projection]:
    """{part: Projection} of one decoder layer; see ``projections_by_linear``."""
    return {part: p for parts in projections_by_linear(layer, family).values() for part, p in parts.items()}


def projections_by_linear(layer: nn.Module, family: Family) -> dict[nn.Linear, dict[str, Projection]]:
    """{Linear: {part: Projection}} of one decoder layer, both in the order of the family's parts, without experts.

    Raises ValueError when a fused Linear's rows cannot be shared among its parts.
    """
    linears = linears_of(layer, family)
    fused: dict[nn.Linear, list[str]] = {}
    for part, linear in linears.items():
        fused.setdefault(linear, []).append(part)
    found = {}
    for linear, parts in fused.items():
        bounds = pairwise(accumulate(_rows_of(parts, linear, linears["o"], family), initial=0))
        found[linear] = {part: Projection(linear, *rows) for part, rows in zip(parts, bounds, strict=True)}
    return found


def _rows_of(parts: list[str], linear: nn.Linear, o: nn.Linear, family: Family) -> list[int]:
    """Rows of each part of a Linear: of a fused q as many as o has columns; the others share the rest equally."""
    query = o.in_features if "q" in parts and len(parts) > 1 else 0
    each, left = divmod(linear.out_features - query, len(parts) - bool(query))
    if left or each < 0:
        raise ValueError(
            f"expected {family.path(parts[0])} to hold rows of {', '.join(parts)}, as many of q as o has columns "
            f"({o.in_features}) and equally many of the others; got {linear.out_features} rows"
        )
    return [query if query and part == "q" else each for part in parts]
