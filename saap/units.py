"""Discovery of coupled structures: the units that pruning removes as a whole (method section 1).

An attention unit is one KV head with the r query heads that read it: rows (and bias entries) of
q, k and v, columns of o. An MLP unit is one channel: a row of gate and up, a column of down; in a mixture of
experts one channel of one expert.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saap.experts import expert_sizes, expert_tensors, mask_experts
from saap.families import Family, family_of, layers_of, linears_of, projections_of
from saap.packed_linear import held_elements
from saap.refuse import refuse_unsupported
from saap.undo import Undo

MODULES = ("attention", "mlp")
IN_PARTS = ("o", "down")  # their columns belong to units; of the other parts, rows


def module_of(part: str) -> str:
    """The module that a part belongs to: "attention" (q, k, v, o) or "mlp" (gate, up, down)."""
    return "attention" if part in ("q", "k", "v", "o") else "mlp"


@dataclass(frozen=True)
class LayerUnits:
    """Sizes of one decoder layer; ``biases`` names the parts whose Linear has a bias.

    A mixture has ``experts`` of width ``intermediate_size`` each, of which a token goes through
    ``experts_per_token``; both are 0 for a dense MLP.
    """

    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool
    biases: tuple[str, ...] = ()
    experts: int = 0
    experts_per_token: int = 0

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads if self.kv_heads else 0

    def count(self, module: str) -> int:
        """Number of units of ``module`` ("attention" or "mlp") in this layer."""
        return self.kv_heads if module == "attention" else self.intermediate_size * max(1, self.experts)

    def used_share(self, module: str) -> float:
        """Share of the units of ``module`` that one token goes through."""
        return self.experts_per_token / self.experts if module == "mlp" and self.experts else 1.0

    @property
    def router_weights(self) -> int:
        """Weights of the router, a row for every expert."""
        return self.experts * self.hidden_size

    def unit_weights(self, module: str) -> int:
        """As ``unit_parameters``, without biases: also the multiply-accumulates of one token."""
        rows, columns = self._unit_lines(module)
        return (sum(rows.values()) + columns) * self.hidden_size

    def unit_parameters(self, module: str) -> int:
        """Parameters that removing one unit of ``module`` removes."""
        rows, _ = self._unit_lines(module)
        return self.unit_weights(module) + sum(size for part, size in rows.items() if part in self.biases)

    def _unit_lines(self, module: str) -> tuple[dict[str, int], int]:
        """Rows of each part and columns of the last that one unit owns."""
        if module == "attention":
            rows = {"q": self.group * self.head_dim, "k": self.head_dim, "v": self.head_dim}
            columns = self.group * self.head_dim
        else:
            rows = {"gate": 1, "up": 1} if self.gated else {"up": 1}
            columns = 1
        return rows, columns

    def parameters(self, module: str) -> int:
        """Parameters of all units of ``module``: what pruning could remove at most."""
        return self.count(module) * self.unit_parameters(module)

    def rows_per_unit(self, part: str) -> int:
        """Rows (q, k, v, gate, up) or columns (o, down) of a part's weight that one unit owns."""
        if part in ("q", "o"):
            return self.group * self.head_dim
        return self.head_dim if part in ("k", "v") else 1


@dataclass(frozen=True)
class Units:
    """All units of a model, by layer, plus what identifies the model.

    ``total_parameters`` counts tied tensors once and embeddings too; ``block_parameters`` counts the
    decoder layers only, ``head_parameters`` the output head, tied or not. ``anchors`` are the first layers
    of each kind of attention, whose caches count positions. Units are addressed as (layer, module, index),
    zero-based.
    """

    family: str
    layers: tuple[LayerUnits, ...]
    total_parameters: int
    block_parameters: int
    fingerprint: str
    head_parameters: int = 0
    anchors: tuple[int, ...] = (0,)

    def check_same(self, units: "Units", what: str) -> None:
        """Raise ValueError unless ``units`` describe the same model; ``what`` is what these belong to."""
        if units.fingerprint != self.fingerprint:
            raise ValueError(
                f"{what} a {self.family} model with fingerprint {self.fingerprint}; "
                f"got a {units.family} model with fingerprint {units.fingerprint}"
            )

    def count(self, module: str) -> int:
        return sum(layer.count(module) for layer in self.layers)

    def offsets(self, module: str) -> list[int]:
        """Start of each layer in a flat array of ``module`` units, and its length at the end."""
        starts = [0]
        for layer in self.layers:
            starts.append(starts[-1] + layer.count(module))
        return starts

    def feature_offsets(self, module: str) -> list[int]:
        """As ``offsets``, of the input features of o ("attention") or down ("mlp")."""
        if module == "mlp":
            return self.offsets(module)
        starts = [0]
        for layer in self.layers:
            starts.append(starts[-1] + layer.query_heads * layer.head_dim)
        return starts

    def expert_offsets(self) -> list[int]:
        """As ``offsets``, of the experts."""
        return [0, *accumulate(layer.experts for layer in self.layers)]

    def indices(self, layer: int, module: str, unit: int) -> dict[str, tuple[str, range]]:
        """{part: ("out" | "in", rows or columns)} of everything one unit owns (bias with "out").

        Of experts the rows, or columns, are those of all experts' matrices one after another.
        """
        sizes = self.layers[layer]
        if not 0 <= unit < sizes.count(module):
            raise ValueError(f"layer {layer} has {module} units 0 to {sizes.count(module) - 1}; got {unit}")
        if module == "attention":
            parts: tuple[str, ...] = ("q", "k", "v", "o")
        else:
            parts = ("gate", "up", "down") if sizes.gated else ("up", "down")
        owned = {}
        for part in parts:
            size = sizes.rows_per_unit(part)
            axis = "in" if part in IN_PARTS else "out"
            owned[part] = (axis, range(unit * size, (unit + 1) * size))
        return owned

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Units":
        fields = json.loads(text)
        layers = tuple(LayerUnits(**{**row, "biases": tuple(row["biases"])}) for row in fields.pop("layers"))
        return cls(layers=layers, **fields | {"anchors": tuple(fields["anchors"])})


def discover(model: PreTrainedModel, family: str | None = None, *, accelerated: bool = False) -> Units:
    """Find the units of ``model`` that can be removed without changing any other shape.

    ``family`` overrides the config's ``model_type``. Sizes are read from the weights, so a model
    that is already pruned is described as it stands. Raises ValueError for unknown families and
    for quantised, PEFT-wrapped or multimodal models, for mixtures of experts with dense layers or shared experts, and,
    unless ``accelerated`` allows them, for those that ``accelerate`` has changed.
    """
    refuse_unsupported(model, accelerated=accelerated)
    row = family_of(model, family)
    layers, head = layers_of(model, row), model.get_output_embeddings()
    described = tuple(_describe(layer, row, index) for index, layer in enumerate(layers))
    return Units(
        family=row.name,
        layers=described,
        total_parameters=elements(model),
        block_parameters=elements(layers),
        fingerprint=fingerprint(model, row),
        head_parameters=elements(head),
        anchors=_anchors(model),
    )


def elements(module: nn.Module) -> int:
    """Parameters, those of packed or quantised weights too."""
    return sum(p.numel() for p in module.parameters()) + held_elements(module)


def _anchors(model: PreTrainedModel) -> tuple[int, ...]:
    kinds = getattr(model.config, "layer_types", None) or ["attention"]
    return tuple(sorted({kinds.index(kind) for kind in set(kinds)}))


def _describe(layer: nn.Module, family: Family, index: int) -> LayerUnits:
    projections = projections_of(layer, family)
    head_dim = int(layer.get_submodule(family.attention).head_dim)  # type: ignore[arg-type]
    for part in ("q", "k", "v"):
        if projections[part].out_features % head_dim:
            raise ValueError(
                f"layer {index}: expected rows of {family.path(part)} to be a multiple of head_dim {head_dim}, "
                f"got {projections[part].out_features}"
            )
    query_heads, kv_heads = (projections[part].out_features // head_dim for part in ("q", "k"))
    if (kv_heads == 0) != (query_heads == 0) or (kv_heads and query_heads % kv_heads):
        raise ValueError(
            f"layer {index}: expected query heads to be a multiple of KV heads, got {query_heads} and {kv_heads}"
        )
    mlp = expert_sizes(layer, family, index) or {"intermediate_size": projections["down"].in_features}
    return LayerUnits(
        hidden_size=projections["q"].in_features,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        gated=family.gate is not None,
        biases=tuple(part for part, projection in projections.items() if projection.bias is not None),
        **mlp,
    )


def fingerprint(model: PreTrainedModel, family: Family) -> str:
    """A short hash of every part's shape and of 64 of its values, rounded to bfloat16.

    The rounding makes one checkpoint loaded in bf16 and in fp32 the same model.
    """
    digest = hashlib.sha256(family.name.encode())
    for layer in layers_of(model, family):
        parts = {part: projection.weight for part, projection in projections_of(layer, family).items()}
        for part, tensor in (parts | expert_tensors(layer, family)).items():
            digest.update(f"{part}{tuple(tensor.shape)}".encode())
            weight = tensor.detach().flatten(0, -2)
            if not weight.is_meta and weight.numel():
                flat = torch.linspace(0, weight.numel() - 1, 64, dtype=torch.float64).long()
                sample = weight[flat // weight.shape[1], flat % weight.shape[1]]
                digest.update(sample.to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def unit_masks(
    model: PreTrainedModel, units: Units, dtype: torch.dtype | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Multiply every unit's output by a mask of ones while the context is open.

    Yields {"attention": [(kv_heads,) per layer], "mlp": [(channels,) per layer, of all experts]} leaf
    tensors that require grad, at the input of o and of down. Zeroing an entry is the same
    function as removing the unit; its gradient is the unit's ``last`` vector salience.
    """
    family = family_of(model, units.family)
    masks: dict[str, list[Tensor]] = {module: [] for module in MODULES}
    undo = Undo()
    for sizes, layer in zip(units.layers, layers_of(model, family), strict=True):
        linears = linears_of(layer, family)
        for module, part in (("attention", "o"), ("mlp", "down")):
            weight = linears.get(part, linears["o"]).weight
            mask = torch.ones(
                sizes.count(module), dtype=dtype or weight.dtype, device=weight.device, requires_grad=True
            )
            masks[module].append(mask)
            if part not in linears:
                undo.add(mask_experts(layer, family, mask))
            elif len(mask):
                undo.add(linears[part].register_forward_pre_hook(_multiplier(mask)).remove)
    try:
        yield masks
    finally:
        undo.restore()


def _multiplier(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        units = x.unflatten(-1, (len(mask), -1))  # [..., U, width per unit]
        return ((units * mask[:, None]).flatten(-2), *args[1:])

    return hook
