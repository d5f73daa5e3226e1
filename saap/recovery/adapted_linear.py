"""Quantised Linears with adapters of their zero points and levels: trained, merged to the bit, unmerged, given up."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saap.packed_linear import cast
from saap.quantised_linear import QuantisedLinear
from saap.recovery.group_adapter import Factors, adapted_linear, merged
from saap.stored_weight import to_stored
from saap_kernels import PackedWeight

FACTORS = {"a": "lora_zero_a", "b": "lora_zero_b", "u": "lora_level_u", "v": "lora_level_v"}  # of Factors: parameters
BASE = ("base_qweight", "base_qzero")  # what merging replaces, kept while it lasts


class AdaptedLinear(QuantisedLinear):
    """A QuantisedLinear (N, K) that learns by an adapter; made from one by changing its class.

    Parameters, fp32: ``lora_zero_a`` (r', G) and ``lora_zero_b`` (N, r'), ``lora_level_u`` (r, K) and
    ``lora_level_v`` (N, r) or None, see ``group_adapter.Factors``. The state dict has them beside the stored form of
    the base, which stays, merged or not. In eval mode the result is bitwise that of the merged weight; in train mode it
    differs by the roundings of sums.
    """

    lora_zero_a: nn.Parameter
    lora_zero_b: nn.Parameter
    lora_level_u: nn.Parameter | None
    lora_level_v: nn.Parameter | None
    scaling: float
    is_merged: bool
    base_qweight: Tensor | None
    base_qzero: Tensor | None

    @classmethod
    def adapt(cls, module: QuantisedLinear, factors: Factors) -> None:
        """Give ``module`` an adapter, whose tensors become its parameters."""
        module.__class__ = cls
        module.__dict__.update(scaling=factors.scaling, is_merged=False)
        for name, parameter in FACTORS.items():
            tensor = getattr(factors, name)
            module.register_parameter(parameter, None if tensor is None else nn.Parameter(tensor))
        for name in BASE:
            module.register_buffer(name, None, persistent=False)

    @property
    def factors(self) -> Factors:
        return Factors(self.lora_zero_a, self.lora_zero_b, self.lora_level_u, self.lora_level_v, self.scaling)

    @property
    def base(self) -> PackedWeight:
        """The weight without the adapter."""
        if not self.is_merged:
            return self.packed
        assert self.base_qweight is not None
        return PackedWeight(self.base_qweight, *self.layout, self.qscale, self.base_qzero)

    def merge(self) -> None:
        """Put the adapter into the packed weight, exact to the last bit; ``unmerge`` takes it back, as exactly."""
        if self.is_merged:
            return
        before = self.packed
        self.base_qweight, self.base_qzero = before.data, before.zero
        self.place(merged(before, self.factors))
        self.is_merged = True

    def unmerge(self) -> None:
        """The weight as it was before ``merge``."""
        if self.is_merged:
            self.place(self.base)
            self.base_qweight = self.base_qzero = None
            self.is_merged = False

    def give_up(self, merge: bool = True) -> None:
        """Be a QuantisedLinear again, with the adapter merged or thrown away."""
        if merge:
            self.merge()
        else:
            self.unmerge()
        for name in (*FACTORS.values(), *BASE):
            delattr(self, name)
        for name in ("scaling", "is_merged"):
            self.__dict__.pop(name)
        self.__class__ = QuantisedLinear  # type: ignore[assignment]  # the class that this one was made of

    def forward(self, input: Tensor) -> Tensor:
        if self.is_merged:
            return super().forward(input)
        return adapted_linear(input, self.packed, cast(self.bias, input), self.factors, exact=not self.training)

    def restore(self) -> None:
        self.give_up()
        QuantisedLinear.restore(self)

    def stored(self) -> dict[str, Tensor]:
        """The three tensors of the base."""
        return to_stored(self.base)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.is_merged:
            errors = rest[-1]
            errors.append(f"{prefix}qweight: the adapters are merged; load after unmerge_adapters()")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedLinear":
        """Factors stay in fp32 whatever dtype the model changes to: steps of a 16-bit one would round to nothing."""
        super()._apply(fn, recurse)
        for name in FACTORS.values():
            parameter = getattr(self, name)
            if parameter is not None and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        return self


def new_factors(module: QuantisedLinear, rank: int, alpha: float, levels: bool, generator: torch.Generator) -> Factors:
    """An adapter that changes nothing yet; a and u are drawn, with columns such that x of unit variance gives the same.

    Zero points, which have G columns only, use min(rank, G); both are scaled by alpha / rank.
    """
    rows, columns = module.out_features, module.in_features
    groups, device = group_count(module), module.qweight.device
    draw = [torch.randn(count, width, generator=generator) / math.sqrt(columns) for count, width in (
        (min(rank, groups), groups), (rank, columns))]  # fmt: skip
    a, u = (each.to(device) for each in draw)
    b, v = (torch.zeros(rows, len(each), device=device) for each in (a, u))
    return Factors(a, b, u if levels else None, v if levels else None, alpha / rank)


def group_count(module: QuantisedLinear) -> int:
    """Groups along a row."""
    group_size = module.layout[2]
    assert group_size is not None
    return -(-module.in_features // group_size)


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, module) of those of ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def merge_adapters(model: nn.Module) -> None:
    """Merge every group-wise adapter of ``model`` into its quantised weight: logits of eval mode stay, bit for bit.

    Raises ValueError, with nothing merged, for factors that are not finite.
    """
    refuse_nonfinite(model)
    for _, module in adapted_linears(model):
        module.merge()


def refuse_nonfinite(model: nn.Module) -> None:
    """Raise ValueError naming a factor of an adapter that is not finite: levels would hide it, being whole numbers."""
    for name, module in adapted_linears(model):
        for parameter in FACTORS.values():
            factor = getattr(module, parameter)
            if factor is not None and not bool(factor.isfinite().all()):
                raise ValueError(f"{name}.{parameter}: expected finite values to merge, found NaN or infinity")


def unmerge_adapters(model: nn.Module) -> None:
    """Take ``merge_adapters`` back: the packed weights are what they were, bit for bit."""
    for _, module in adapted_linears(model):
        module.unmerge()
