"""What learns in a model, by method: attached to train, and finished into a model that holds nothing else."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.families import family_of
from saap.quantised_linear import QuantisedLinear, is_quantised
from saap.recovery.adapted_linear import AdaptedLinear, adapted_linears, new_factors, refuse_nonfinite
from saap.recovery.group_adapter import Factors
from saap.recovery.learned_norms import LearnedNorms
from saap.recovery.settings import Settings
from saap.refuse import refuse_meta, refuse_unsupported


class Attached(Protocol):
    """A model with what learns attached: its parameters that require grad learn, all others are frozen."""

    model: nn.Module  # what the trainer runs; called with input_ids, use_cache, output_hidden_states

    def finish(self) -> PreTrainedModel:
        """The model with all that was learned merged into its weights, saved like any other."""
        ...


def attach(model: PreTrainedModel, settings: Settings) -> Attached:
    """Make ``model`` one that learns by ``settings.method``, in place; quantised before, where the settings say bits.

    "groupwise": adapters on all quantised Linears, and the weights of norms with ``settings.norms``, both drawn and
    learned in fp32. "lora": peft's LoRA on all Linears of the decoder layers, plain or quantised; ``finish`` merges
    into plain weights, as which quantised ones are written out first. "full": every parameter of a plain model.
    Draws follow from ``settings.seed``. ``finish`` gives every parameter its ``requires_grad`` back.

    Raises ValueError before the model is changed, for models and ranks that the settings do not fit, and RuntimeError
    where peft is missing.
    """
    refuse_unsupported(model, quantised=True)
    refuse_meta(model)
    refuse_other_quantisation(model, settings)
    if settings.bits is not None and not is_quantised(model):
        raise ValueError(
            f"model: expected one quantised to int{settings.bits} in groups of {settings.group_size}, "
            "got 16- or 32-bit weights; call saap.quantise first"
        )
    if settings.method == "groupwise":
        return attach_groupwise(model, settings)
    if settings.method == "lora":
        from saap.recovery.lora import attach_lora  # peft is an extra

        return attach_lora(model, settings)
    return Full(model)


class Full:
    """Every parameter learns."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._before = requirements(model)
        model.requires_grad_(True)

    def finish(self) -> PreTrainedModel:
        require(self.model, self._before)
        return self.model


class Groupwise:
    """Adapters, and norms, learn."""

    def __init__(self, model: PreTrainedModel, factors: dict[str, Factors], norms: bool) -> None:
        self.model = model
        self._before = requirements(model)
        model.requires_grad_(False)
        linears = quantised_linears(model)
        for name, each in factors.items():
            AdaptedLinear.adapt(linears[name], each)
        self._norms = LearnedNorms(model) if norms else None

    def finish(self) -> PreTrainedModel:
        """Raises ValueError, with nothing merged, for factors that are not finite."""
        refuse_nonfinite(self.model)
        return self._end(merge=True)

    def discard(self) -> PreTrainedModel:
        """The model as it was, bit for bit but for the norms' learned weights, which stay."""
        return self._end(merge=False)

    def _end(self, merge: bool) -> PreTrainedModel:
        for _, module in list(adapted_linears(self.model)):
            module.give_up(merge)
        if self._norms is not None:
            self._norms.finish()
        require(self.model, self._before)
        return self.model


def attach_groupwise(model: PreTrainedModel, settings: Settings) -> Groupwise:
    """``attach`` for method "groupwise"."""
    linears = quantised_linears(model)
    refuse_rank(linears, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    factors = {
        name: new_factors(module, settings.rank, settings.alpha, settings.levels, generator)
        for name, module in linears.items()
    }
    return Groupwise(model, factors, settings.norms)


def refuse_rank(linears: Mapping[str, nn.Linear], settings: Settings) -> None:
    """Raise ValueError for a rank that the narrowest Linear, quantised or yet to be, has no room for."""

    def room(name: str) -> int:
        module = linears[name]
        groups = -(-module.in_features // settings.group_size)
        return min(module.in_features, module.out_features) if settings.levels else groups

    name = min(linears, key=room)
    if settings.rank <= room(name):
        return
    size = f"{name} ({linears[name].out_features} x {linears[name].in_features})"
    if settings.levels:
        raise ValueError(f"rank: expected at most {room(name)}, the smaller side of {size}, got {settings.rank}")
    raise ValueError(
        f"rank: expected at most {room(name)}, the groups of {settings.group_size} in a row of {size}, "
        f"got {settings.rank}; levels, if they learn, have room for more"
    )


def quantised_linears(model: nn.Module) -> dict[str, QuantisedLinear]:
    """{name: module}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def decoder_linears(model: PreTrainedModel) -> list[str]:
    """Names of the Linears of the decoder layers, plain or quantised, of which something is left; no routers."""
    family = family_of(model)
    router = "" if family.router is None else family.router
    layers = model.get_submodule(family.layers)
    return [
        name
        for name, module in layers.named_modules(prefix=family.layers)
        if isinstance(module, nn.Linear)
        and min(module.in_features, module.out_features)
        and not (router and name.endswith(f".{router}"))
    ]


def requirements(model: nn.Module) -> dict[str, bool]:
    """{name: requires_grad}, tied parameters by all of their names."""
    return {name: each.requires_grad for name, each in model.named_parameters(remove_duplicate=False)}


def require(model: nn.Module, before: dict[str, bool]) -> None:
    """Take ``requirements`` back; parameters that were none then are left as they are."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(before.get(name, parameter.requires_grad))


def refuse_other_quantisation(model: PreTrainedModel, settings: Settings) -> None:
    """Raise ValueError where the quantised Linears of ``model`` have other bits or groups than the settings say."""
    asked = f"int{settings.bits} in groups of {settings.group_size}"
    for name, module in quantised_linears(model).items():
        _, bits, group_size = module.layout
        found = f"int{bits} in groups of {group_size}"
        if settings.bits is None:
            other = "" if settings.method == "full" else f"bits {bits} (--bits), or "
            raise ValueError(
                f"the model is quantised ({found}), which method {settings.method} with bits None does not tune: give "
                f"{other}the model that it was made from"
            )
        if found != asked:
            raise ValueError(
                f"the model is quantised already: expected settings of {found} (--bits {bits} --group-size "
                f"{group_size}), as {name} is, got {asked}"
            )
