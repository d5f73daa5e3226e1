"""Compaction: cut the removed units out of the weights, layer by layer, in place."""

import copy as copying

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from saap.families import Family, family_of, layers_of, projections_by_linear
from saap.layout import adopt, describe_as_stock, describe_as_template, is_template
from saap.plan import LayerPlan, Plan
from saap.units import IN_PARTS, LayerUnits, discover, module_of

PLAN_ATTRIBUTE = "saap_plan"


def compact(model: PreTrainedModel, plan: Plan, *, copy: bool = False) -> PreTrainedModel:
    """Remove the units that ``plan`` does not keep; the same object is changed and returned.

    With ``copy`` the model is left alone and a pruned copy is returned. The result computes, generates
    and saves like any transformers model: if all layers have one size that the family's own
    configuration can express it stays a stock model, otherwise its class becomes the generic
    template's. dtype, device and requires_grad are kept, tied embeddings stay tied.

    Raises ValueError when the plan was made for another model; nothing is changed then.
    """
    units = discover(model)
    plan.check_model(units)
    if copy:
        model = copying.deepcopy(model)
    family = family_of(model)
    for layer, sizes, kept in zip(layers_of(model, family), units.layers, plan.layers, strict=True):
        _cut_layer(layer, family, sizes, kept)
    result = discover(model).layers
    adopt(model, family, _describe(model, family, result))
    object.__setattr__(model, PLAN_ATTRIBUTE, plan)
    return model


def _describe(model: PreTrainedModel, family: Family, layers: tuple[LayerUnits, ...]) -> PreTrainedConfig:
    if len(set(layers)) == 1 and not is_template(model):
        try:
            return describe_as_stock(model.config, family, layers[0])
        except ValueError:  # the family's configuration refuses these sizes: the template takes any
            pass
    return describe_as_template(model.config, family, layers, type(model))


@torch.no_grad()
def _cut_layer(layer: nn.Module, family: Family, sizes: LayerUnits, kept: LayerPlan) -> None:
    for linear, parts in projections_by_linear(layer, family).items():
        module = module_of(next(iter(parts)))
        units = torch.tensor(kept.kv_heads if module == "attention" else kept.channels, dtype=torch.long)
        if len(units) == sizes.count(module):
            continue
        index = torch.cat([p.start + _lines(units, sizes.rows_per_unit(part)) for part, p in parts.items()])
        index = index.to(linear.weight.device)
        if any(part in IN_PARTS for part in parts):
            linear.weight = _parameter(linear.weight, 1, index)
            linear.in_features = len(index)
        else:
            linear.weight = _parameter(linear.weight, 0, index)
            if linear.bias is not None:
                linear.bias = _parameter(linear.bias, 0, index)
            linear.out_features = len(index)


def _lines(units: Tensor, width: int) -> Tensor:
    """The rows or columns of ``units`` that own ``width`` consecutive ones each."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def _parameter(old: Tensor, dim: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(old.index_select(dim, index).contiguous(), requires_grad=old.requires_grad)
