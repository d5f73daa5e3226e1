"""The definition of every statistic by plain autograd, one sequence at a time, in float64.

Slow and obvious on purpose: gradients of all weights are formed, each unit's entries are gathered
by its index list, and nothing is shared with the code under test except those index lists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.families import Family, family_of, layers_of, linears_of, projections_of
from saap.plan import Plan
from saap.statistics import ORDERS
from saap.units import MODULES, Units


def sequence_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean next-token loss of one unpadded sequence (T,), in the model's own precision."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], ids[1:])


def salience_per_sequence(model: PreTrainedModel, units: Units, sequences: list[Tensor]) -> dict:
    """{(layer, module, part): {"signed", "first", "second", "mixed", "vector first", ...: (S, U)}}, float64.

    Sums over each unit's weights and biases of s, |s|, s^2 and |s - s^2 / 2|, s = w * dloss_n / dw; "vector ..." the
    same of its rows' or columns' sums, which are themselves in "lines" (S, U, rows or columns).
    """
    family = family_of(model, units.family)
    results: dict = {}
    for layer in layers_of(model, family):
        for weight in [linear.weight for linear in linears_of(layer, family).values()] + expert_weights(layer):
            weight.requires_grad_(True)
    for ids in sequences:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            sequence_loss(model, ids).backward()
        for layer_index, layer in enumerate(layers_of(model, family)):
            saliences = _saliences(layer, family)
            for module in MODULES:
                _add_layer(results, units, layer_index, module, saliences)
    model.zero_grad(set_to_none=True)
    return {key: {name: torch.stack(rows) for name, rows in value.items()} for key, value in results.items()}


def expert_weights(layer: nn.Module) -> list[Tensor]:
    """gate_up_proj (E, 2 F, D) and down_proj (E, D, F) of a mixture of experts; nothing for a dense MLP."""
    experts = getattr(getattr(layer, "mlp", None), "experts", None)
    return [] if experts is None else [experts.gate_up_proj, experts.down_proj]


@contextmanager
def experts_unreachable(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Routers give the experts that ``plan`` drops a logit of minus infinity while the context is open."""
    routers = [layer.mlp.gate for layer in layers_of(model, family_of(model)) if expert_weights(layer)]

    def forward(router: nn.Module, dropped: list[int], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        logits[:, dropped] = -torch.inf
        scores, chosen = logits.float().softmax(-1).topk(router.top_k, dim=-1)
        if getattr(router, "norm_topk_prob", True):  # Mixtral always does
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores, chosen

    for router, layer in zip(routers, plan.layers, strict=False):
        dropped = sorted(set(range(len(router.weight))) - set(layer.experts))
        router.forward = partial(forward, router, dropped)
    try:
        yield
    finally:
        for router in routers:
            del router.forward


def _saliences(layer: nn.Module, family: Family) -> dict[str, tuple[Tensor, Tensor | None]]:
    """{part: w * dw of its weight (rows, columns) and of its bias}; experts one after another."""
    found = {}
    for part, projection in projections_of(layer, family).items():
        linear, rows = projection.linear, projection.rows
        bias = None if linear.bias is None else (linear.bias * linear.bias.grad).detach()[rows]
        found[part] = (linear.weight * linear.weight.grad).detach()[rows], bias
    if expert_weights(layer):
        first, down = ((weight * weight.grad).detach() for weight in expert_weights(layer))
        gate, up = first.chunk(2, dim=1)
        found |= {"gate": (gate.flatten(0, 1), None), "up": (up.flatten(0, 1), None)}
        found["down"] = torch.cat(list(down), 1), None  # [D, E * F]
    return found


def _add_layer(results: dict, units: Units, layer: int, module: str, saliences: dict) -> None:
    owned = [units.indices(layer, module, unit) for unit in range(units.layers[layer].count(module))]
    for part in owned[0]:
        weight, bias = saliences[part]
        names = ("signed", "lines", *ORDERS, *(f"vector {order}" for order in ORDERS))
        sums: dict[str, list[Tensor]] = {name: [] for name in names}
        for unit in owned:
            axis, where = unit[part]
            index = torch.tensor(list(where))
            chosen = weight.index_select(0 if axis == "out" else 1, index)
            s, lines = chosen.flatten(), chosen.sum(1 if axis == "out" else 0)
            if axis == "out" and bias is not None:
                s, lines = torch.cat([s, bias[index]]), lines + bias[index]
            sums["vector first"].append(lines.abs().sum())
            sums["vector second"].append(lines.square().sum())
            sums["vector mixed"].append((lines - lines.square() / 2).abs().sum())
            sums["lines"].append(lines)
            sums["signed"].append(s.sum())
            sums["first"].append(s.abs().sum())
            sums["second"].append(s.square().sum())
            sums["mixed"].append((s - s.square() / 2).abs().sum())
        row = results.setdefault((layer, module, part), {name: [] for name in sums})
        for name, values in sums.items():
            row[name].append(torch.stack(values))
