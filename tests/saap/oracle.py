"""The definition of every statistic by plain autograd, one sequence at a time, in float64.

Slow and obvious on purpose: gradients of all weights are formed, each unit's entries are gathered
by its index list, and nothing is shared with the code under test except those index lists.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.families import family_of, layers_of, linears_of, projections_of
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
        for linear in linears_of(layer, family).values():
            linear.weight.requires_grad_(True)
    for ids in sequences:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            sequence_loss(model, ids).backward()
        for layer_index, layer in enumerate(layers_of(model, family)):
            projections = projections_of(layer, family)
            for module in MODULES:
                _add_layer(results, units, layer_index, module, projections)
    model.zero_grad(set_to_none=True)
    return {key: {name: torch.stack(rows) for name, rows in value.items()} for key, value in results.items()}


def _add_layer(results: dict, units: Units, layer: int, module: str, projections: dict) -> None:
    owned = [units.indices(layer, module, unit) for unit in range(units.layers[layer].count(module))]
    for part in owned[0]:
        linear, rows = projections[part].linear, projections[part].rows
        weight = (linear.weight * linear.weight.grad).detach()[rows]
        bias = None if linear.bias is None else (linear.bias * linear.bias.grad).detach()[rows]
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
