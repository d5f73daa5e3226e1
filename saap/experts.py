"""Mixtures of experts: one MLP layer is E gated MLPs in two 3-D tensors, and a router that sends each token to k.

A unit is one channel of one expert, so a layer has E * F of them, F the width, flat and expert by expert. One
tensor holds all experts of a layer, so they keep one width, each with its own best channels; whole experts may go,
with their row of the router. Shapes: gate_up_proj (E, 2 F, D), gate before up; down_proj (E, D, F); router (E, D).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saap.families import Family, Projection, projections_of
from saap.undo import Undo

GROUPED_MULTIPLE = 8  # torch's grouped products want rows of whole 16 bytes, in 16 bits as well
EXPERT_PARTS = ("gate", "up", "down")


class ExpertLinear:
    """One expert's matrix as a Linear without bias: a view of its 3-D parameter as it is now."""

    bias = None

    def __init__(self, experts: nn.Module, name: str, expert: int) -> None:
        self.experts, self.name, self.expert = experts, name, expert

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features)."""
        return getattr(self.experts, self.name)[self.expert]

    @property
    def in_features(self) -> int:
        return int(getattr(self.experts, self.name).shape[2])


def experts_of(layer: nn.Module, family: Family) -> Any:
    """The module with the weights of all experts of a decoder layer."""
    assert family.experts is not None  # asked of mixtures only
    return layer.get_submodule(family.experts)


def router_of(layer: nn.Module, family: Family) -> Any:
    """The module whose weight (E, D) scores the experts of a decoder layer."""
    assert family.router is not None  # asked of mixtures only
    return layer.get_submodule(family.router)


def expert_sizes(layer: nn.Module, family: Family, index: int) -> dict[str, int]:
    """Fields of LayerUnits that describe a layer's experts; none for families without.

    Raises ValueError naming a layer with a dense MLP, or whose tensors are not those of the module's docstring.
    """
    if family.experts is None:
        return {}
    block = layer.get_submodule(family.experts.rpartition(".")[0])
    names = [path.rpartition(".")[2] for path in (family.experts, str(family.router))]
    experts, router = (getattr(block, name, None) for name in names)
    if experts is None or router is None:
        raise ValueError(
            f"layer {index}: expected a router and experts, got {type(block).__name__}: in a {family.name} model "
            "every layer must be a mixture of experts (no mlp_only_layers, decoder_sparse_step 1)"
        )
    tensors: dict[str, Any] = {name: getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")}
    tensors["router"] = getattr(router, "weight", None)
    found = {name: tuple(tensor.shape) if isinstance(tensor, Tensor) else () for name, tensor in tensors.items()}
    count, hidden, width = found["down_proj"] if len(found["down_proj"]) == 3 else (0, 0, 0)
    wanted = {
        "gate_up_proj": (count, 2 * width, hidden),
        "down_proj": (count, hidden, width),
        "router": (count, hidden),
    }
    if found != wanted:
        raise ValueError(f"layer {index}: expected experts in tensors (E, 2 F, D), (E, D, F) and (E, D); got {found}")
    return {"intermediate_size": width, "experts": count, "experts_per_token": int(router.top_k)}


def _expert_projections(layer: nn.Module, family: Family) -> Iterator[tuple[str, Projection]]:
    """(part, Projection) of gate, up and down of every expert of a layer; nothing without experts."""
    if family.experts is None:
        return
    experts = experts_of(layer, family)
    count, hidden, width = experts.down_proj.shape
    for expert in range(int(count)):
        first = ExpertLinear(experts, "gate_up_proj", expert)
        yield "gate", Projection(first, 0, int(width))
        yield "up", Projection(first, int(width), 2 * int(width))
        yield "down", Projection(ExpertLinear(experts, "down_proj", expert), 0, int(hidden))


def each_projection(layer: nn.Module, family: Family) -> Iterator[tuple[str, Projection]]:
    """(part, Projection) of everything that pruning may cut in a layer; gate, up and down once per expert."""
    yield from projections_of(layer, family).items()
    yield from _expert_projections(layer, family)


def expert_tensors(layer: nn.Module, family: Family) -> dict[str, Tensor]:
    """The tensors that hold a layer's experts and their router, by their paths; none without experts."""
    if family.experts is None:
        return {}
    experts, router = experts_of(layer, family), router_of(layer, family)
    named = {f"{family.experts}.{name}": getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
    return named | {f"{family.router}.weight": router.weight}


class Routing:
    """Pairs of a token and an expert it goes to, (n,) each: expert by expert, tokens ascending within one."""

    def __init__(self, top_k_index: Tensor, experts: int) -> None:
        """top_k_index (T, k), the experts of every token."""
        flat = top_k_index.flatten()
        self.experts, self.order = flat.sort(stable=True)  # order: places in the flattened (T, k)
        self.per_token = top_k_index.shape[1]
        self.tokens = self.order // self.per_token
        self.counts: list[int] = torch.bincount(flat, minlength=experts).tolist()

    def run(
        self, experts: Any, hidden: Tensor, weights: Tensor,
        gate_up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """The layer's output (T, D) for hidden (T, D) and router weights (T, k), by products of the sorted rows."""
        rows = down(experts._apply_gate(gate_up(hidden[self.tokens])))  # [n, D]
        rows = rows * weights.flatten()[self.order, None]
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(back), device=back.device)
        return rows[back].unflatten(0, (-1, self.per_token)).sum(1).to(hidden.dtype)  # no order of atomic additions

    def places(self, spans: Tensor) -> Tensor:
        """(n,): 2 s + 1 for pairs whose token is in sequence s of spans (S, 2), even numbers for tokens between."""
        return torch.searchsorted(spans.flatten().to(self.tokens), self.tokens, right=True)

    def rows_of_sequences(self, spans: Tensor) -> Tensor:
        """Rows of each expert that belong to each sequence, half-open ranges (E, S, 2) int64 on the CPU.

        spans (S, 2) are the sequences' row ranges in the tokens, increasing and disjoint.
        """
        places = 2 * len(spans) + 1
        keys = self.experts * places + self.places(spans)
        counts = torch.bincount(keys, minlength=len(self.counts) * places).cpu()
        stops = counts.cumsum(0)
        return torch.stack([stops - counts, stops], -1).view(-1, places, 2)[:, 1::2]


def grouped(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Rows of each expert times its matrix transposed: rows (n, K), weight (E, N, K) -> (n, N)."""
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(rows.split(counts), weight, strict=True)])


def patch_experts(layer: nn.Module, family: Family, inner: Callable[[Tensor, Routing], Tensor]) -> Callable[[], None]:
    """Put hidden states of all experts, sorted rows (n, F), through ``inner`` until the returned function is called."""
    experts = experts_of(layer, family)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first, second = experts.gate_up_proj, experts.down_proj
        routing = Routing(top_k_index, len(second))
        return routing.run(
            experts, hidden_states, top_k_weights,
            lambda rows: grouped(rows, first, routing.counts),
            lambda rows: grouped(inner(rows, routing), second, routing.counts),
        )  # fmt: skip

    undo = Undo()
    undo.patch_forward(experts, forward)
    return undo.restore


def mask_experts(layer: nn.Module, family: Family, mask: Tensor) -> Callable[[], None]:
    """Multiply the hidden states of all experts by mask (E * F,) until the returned function is called."""
    return patch_experts(layer, family, lambda rows, routing: rows * mask.view(-1, rows.shape[1])[routing.experts])


@torch.no_grad()
def cut_experts(layer: nn.Module, family: Family, kept: tuple[int, ...], channels: Tensor) -> None:
    """Leave the experts ``kept`` (K,) in a layer, each with its own channels (K, w), and their rows of the router."""
    experts, router = experts_of(layer, family), router_of(layer, family)
    first, second = experts.gate_up_proj, experts.down_proj
    width = second.shape[2]
    if len(kept) == len(second) and channels.shape[1] == width:
        return
    rows = channels.to(second.device)
    experts.gate_up_proj = _stacked(first, 0, kept, torch.cat([rows, rows + width], 1))
    experts.down_proj = _stacked(second, 1, kept, rows)
    router.weight = _like(router.weight, router.weight[list(kept)])
    experts.num_experts = router.num_experts = len(kept)
    experts.intermediate_dim = rows.shape[1]


def _stacked(old: Any, dim: int, kept: tuple[int, ...], index: Tensor) -> nn.Parameter:
    new = torch.stack([old[expert].index_select(dim, own) for expert, own in zip(kept, index, strict=True)])
    return _like(old, new)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
