"""Gated MLPs whose forward is one op over the packed weights of their Linears."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from saap.packed_linear import HeldLinear, Packed, SharedLinear, cast, half, with_static_addresses
from saap_kernels import PackedWeight, gated_mlp


class GatedMLP:
    """What a gated MLP's class becomes a subclass of: its forward is one op over the packed weights of its Linears.

    ``names``: the children that are gate, up and down; gate and up may be one child, whose first half is the gate.
    Where the op cannot stand for what the children do (hooks, another forward, gradients of weights), or they were
    exchanged, the MLP's own forward calls them.
    """

    names: tuple[str, str, str]
    activation: str
    gate_up: PackedWeight
    halves: tuple[PackedWeight, ...]  # as gate and up got them; none where they are one Linear

    @classmethod
    def convert(cls, module: nn.Module, names: tuple[str, str, str], activation: str) -> None:
        """``module``, whose Linears are converted already."""
        module.__dict__.update(names=names, activation=activation)
        module.__class__ = gated_class(type(module))  # type: ignore[arg-type]  # classes can be hashed
        module.stack()  # type: ignore[operator]  # of this class from here on

    def linears(self) -> list[Any]:
        return [getattr(self, name) for name in self.names]

    def stack(self) -> None:
        """Gate and up as one packed weight, of which theirs are halves."""
        gate, up, _ = self.linears()
        if gate is up:
            self.gate_up, self.halves = gate.packed, ()
            return
        parts = [each.packed for each in (gate, up)]
        data, scale, zero = (
            None if first is None else torch.stack([first, second])
            for first, second in ((getattr(parts[0], n), getattr(parts[1], n)) for n in ("data", "scale", "zero"))
        )
        assert data is not None
        shape = (2, *parts[0].shape)
        self.place(PackedWeight(data, shape, parts[0].bits, parts[0].group_size, scale, zero))

    def place(self, packed: PackedWeight) -> None:
        """Let gate and up keep their weights in the halves of ``packed``, which holds their values."""
        self.gate_up = with_static_addresses(packed)
        self.halves = half(packed, 0), half(packed, 1)
        for each, own in zip(self.linears(), self.halves, strict=False):
            each.place(own)

    def restore(self) -> None:
        """The module of the class that this was; its Linears are restored by themselves."""
        for name in ("names", "activation", "gate_up", "halves"):
            self.__dict__.pop(name)
        self.__class__ = type(self).__bases__[1]

    def stacked(self) -> bool:
        """Whether gate and up still are the halves of ``gate_up``."""
        gate, up, _ = self.linears()
        if gate is up:
            return _same(self.gate_up, gate.packed)
        return all(_same(each.packed, own) for each, own in zip((gate, up), self.halves, strict=True))

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        gate, up, down = self.linears()
        if args or kwargs or not all(_stands_for(each) for each in (gate, up, down)) or not self.stacked():
            return super().forward(hidden, *args, **kwargs)  # type: ignore[misc]  # the MLP's own class is the next
        biases = None
        if gate.bias is not None:
            biases = gate.bias.view(2, -1) if gate is up else torch.stack([gate.bias, up.bias])
        return gated_mlp(
            hidden, self.gate_up, down.packed, cast(biases, hidden), cast(down.bias, hidden),
            activation=self.activation,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GatedMLP":
        super()._apply(fn, recurse)  # type: ignore[misc]
        if all(isinstance(each, Packed) for each in self.linears()) and not self.stacked():
            self.stack()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in ("gate_up", "halves")}
        return _blank, (type(self).__bases__[1],), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.stack()


@cache
def gated_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an MLP's class that runs ``gated_mlp``."""
    return type(f"Accelerated{base.__name__}", (GatedMLP, base), {"__doc__": GatedMLP.__doc__})


def _same(one: PackedWeight, other: PackedWeight) -> bool:
    """Whether both are the same tensors: a change of dtype exchanges scale and zero, not quantised data."""
    return one.data is other.data and one.scale is other.scale and one.zero is other.zero


def _blank(base: type[nn.Module]) -> nn.Module:
    kind = gated_class(base)  # type: ignore[arg-type]  # as above
    return kind.__new__(kind)


def _stands_for(module: Any) -> bool:
    """Whether a kernel may compute what this Linear does without calling it."""
    return (
        isinstance(module, Packed)
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__
        and not module.wants_gradients()
        and module.in_place()
    )


def is_accelerated(model: nn.Module) -> bool:
    """Whether ``accelerate`` has changed ``model``; Linears of a quantised checkpoint are none of its."""
    return any(isinstance(module, GatedMLP) or type(module) in (SharedLinear, HeldLinear) for module in model.modules())
