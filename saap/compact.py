"""Compaction: cut the removed units out of the weights, layer by layer, in place."""

import copy as copying
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from saap.compensate import Compensation
from saap.experts import cut_experts, experts_of
from saap.families import Family, family_of, layers_of, linears_of, projections_by_linear
from saap.layout import adopt, biases_of_stock, describe_as_stock, describe_as_template, is_template
from saap.plan import LayerPlan, Plan
from saap.serving.targets import check_config
from saap.units import IN_PARTS, LayerUnits, discover, module_of

PLAN_ATTRIBUTE = "saap_plan"


def compact(
    model: PreTrainedModel, plan: Plan, compensation: Compensation | None = None, *, copy: bool = False
) -> PreTrainedModel:
    """Remove the units that ``plan`` does not keep; the same object is changed and returned.

    ``compensation``, computed on this model for this plan, gives o and down new weights and biases. Where the
    family has no bias for them, all layers get one (zero where nothing was removed).

    With ``copy`` the model is left alone and a pruned copy is returned. The result computes, generates
    and saves like any transformers model: if all layers have one size that the family's own
    configuration can express it stays a stock model, otherwise its class becomes the generic
    template's. dtype, device and requires_grad are kept, tied embeddings stay tied.

    Raises ValueError when the plan was made for another model, the compensation for another plan, or when the target
    that the plan was made for does not take the result; nothing is changed then.
    """
    units = discover(model)
    plan.check_model(units)
    if compensation is not None:
        compensation.check_plan(plan)
        plan = replace(plan, settings=plan.settings | compensation.settings)
    applied = {} if compensation is None else compensation.settings  # a plan's own may tell of another model
    check_config(plan.settings.get("target"), model.config, applied.get("compensate", "none"))
    if copy:
        model = copying.deepcopy(model)
    family = family_of(model)
    for layer, sizes, kept in zip(layers_of(model, family), units.layers, plan.layers, strict=True):
        _cut_layer(layer, family, sizes, kept)
    added = _replace(model, family, compensation) if compensation is not None else False
    adopt(model, family, _describe(model, family, added))
    object.__setattr__(model, PLAN_ATTRIBUTE, plan)
    return model


def _describe(model: PreTrainedModel, family: Family, added: bool) -> PreTrainedConfig:
    layers = discover(model).layers
    if len(set(layers)) == 1 and not is_template(model):
        try:
            config = describe_as_stock(model.config, family, layers[0])
            if added:
                _add_biases(model, family, biases_of_stock(config, family, layers[0].biases))
            return config
        except ValueError:  # the family's configuration refuses these sizes or biases: the template takes any
            pass
    return describe_as_template(model.config, family, layers, type(model))


@torch.no_grad()
def _cut_layer(layer: nn.Module, family: Family, sizes: LayerUnits, kept: LayerPlan) -> None:
    for linear, parts in projections_by_linear(layer, family).items():
        module = module_of(next(iter(parts)))
        units = torch.tensor(kept.kv_heads if module == "attention" else kept.channels, dtype=torch.long)
        if len(units) == sizes.count(module):
            continue
        index = torch.cat([p.start + kept.features(part, sizes) for part, p in parts.items()]).to(linear.weight.device)
        if any(part in IN_PARTS for part in parts):
            linear.weight = _parameter(linear.weight, 1, index)
            linear.in_features = len(index)
        else:
            linear.weight = _parameter(linear.weight, 0, index)
            if linear.bias is not None:
                linear.bias = _parameter(linear.bias, 0, index)
            linear.out_features = len(index)
    if family.experts is not None:
        cut_experts(layer, family, kept.experts, kept.channels_by_expert(sizes))


@torch.no_grad()
def _replace(model: PreTrainedModel, family: Family, compensation: Compensation) -> bool:
    """Put in the new weights and biases; returns whether a Linear got a bias that had none."""
    biased = {part for new in compensation.layers for part, found in new.items() if found.bias is not None}
    added = _add_biases(model, family, biased)
    for layer, new in zip(layers_of(model, family), compensation.layers, strict=True):
        linears = linears_of(layer, family)
        for part, found in new.items():
            if part not in linears and found.weight is not None:
                experts = experts_of(layer, family)
                experts.down_proj = _like(experts.down_proj, found.weight)
            elif found.weight is not None:
                linears[part].weight = _like(linears[part].weight, found.weight)
            if found.bias is not None:
                linears[part].bias = _like(linears[part].bias, found.bias)
    return added


def _add_biases(model: PreTrainedModel, family: Family, parts: Iterable[str]) -> bool:
    """A bias of zeros for these parts of every layer, where they have none; returns whether one was added."""
    added = False
    for layer in layers_of(model, family):
        for part, linear in linears_of(layer, family).items():
            if part in parts and linear.bias is None:
                linear.bias = _like(linear.weight, torch.zeros(linear.out_features))
                added = True
    return added


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(old), requires_grad=old.requires_grad)


def _parameter(old: Tensor, dim: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(old.index_select(dim, index).contiguous(), requires_grad=old.requires_grad)
