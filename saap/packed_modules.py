"""Linears and gated MLPs that run the compacted-weight kernels, made from a model's own by changing their class.

Names, shapes and values in the state dict stay. Where a kernel cannot stand for what a module does (hooks or another
forward on a Linear inside of an MLP, gradients of weights), the module's own forward runs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from saap_kernels import PackedWeight, gated_mlp, linear, pack, unpack
from saap_kernels.packed import LINE


class SharedLinear(nn.Linear):
    """A Linear whose weight is a view of packed storage with the same values: a parameter as before.

    ``packed`` (N, K), or (2, N / 2, K) for gate and up in one Linear.
    """

    packed: PackedWeight

    @classmethod
    def convert(cls, module: nn.Linear, packed: PackedWeight) -> None:
        module.__class__ = cls
        module.place(packed)  # type: ignore[operator]  # of this class from here on

    def place(self, packed: PackedWeight) -> None:
        """Keep the weight in ``packed``, which holds its values."""
        self.weight.data = _rows(packed).data[: self.out_features, : self.in_features]
        self.packed = _with_static_addresses(packed)

    def restore(self) -> None:
        """The Linear that this was, with a weight of its own again."""
        self.weight.data = self.weight.data.clone(memory_format=torch.contiguous_format)
        del self.packed
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def in_place(self) -> bool:
        """Whether the weight still is the packed one, and not another that somebody put in its stead."""
        # tracing reads no addresses, and is done after the first change of a model rather than before
        return torch.compiler.is_compiling() or self.weight.data_ptr() == self.packed.data.data_ptr()

    def wants_gradients(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def forward(self, input: Tensor) -> Tensor:
        if self.wants_gradients() or not self.in_place():
            return super().forward(input)
        return linear(input, _rows(self.packed), _cast(self.bias, input))

    def _repack(self) -> None:
        weight = self.weight.detach()
        self.place(packed_exactly(weight.unflatten(0, self.packed.shape[:-1])))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SharedLinear":
        super()._apply(fn, recurse)
        old, new = self.packed.data, self.weight
        if (old.device, old.dtype, old.data_ptr()) != (new.device, new.dtype, new.data_ptr()):
            self._repack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": replace(self.packed, data=self.packed.data.new_empty(0))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._repack()


class HeldLinear(nn.Linear):
    """A Linear whose weight exists as packed buffers only: no parameter, a weight made anew in the state dict.

    The parameter ``weight`` is None. Buffers follow ``to``; a change of dtype reaches scale and zero.
    """

    layout: tuple[tuple[int, ...], int, int | None]

    @classmethod
    def convert(cls, module: nn.Linear, packed: PackedWeight, keep_weight: bool = False) -> None:
        """``keep_weight`` keeps the weight as it was, beside the packed one, for ``restore``."""
        weight = module.weight
        kept = (weight,) if keep_weight else ()
        module.__dict__.update(kept=kept, trainable=weight.requires_grad)
        module.weight = None  # type: ignore[assignment]  # a parameter may be absent
        module.register_buffer("like", weight.new_empty(0).detach(), persistent=False)
        module.__class__ = cls
        module.place(packed)  # type: ignore[operator]  # of this class from here on

    def place(self, packed: PackedWeight) -> None:
        """Keep these tensors as the weight."""
        self.layout = packed.shape, packed.bits, packed.group_size
        for name in ("data", "scale", "zero"):
            self.register_buffer(f"packed_{name}", getattr(packed, name), persistent=False)

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.packed_data, *self.layout, self.packed_scale, self.packed_zero)

    def unpacked_weight(self) -> Tensor:
        """(N, K), the values that the kernels compute with, in the dtype of the model."""
        return unpack(self.packed, dtype=self.like.dtype).flatten(0, -2).contiguous()

    def restore(self) -> None:
        """The Linear that this was: with the weight it had if that was kept, else with the values of the packed one."""
        weight = self.kept[0].data.to(self.like) if self.kept else self.unpacked_weight()
        parameter = self.kept[0] if self.kept else nn.Parameter(weight, requires_grad=self.trainable)
        parameter.data = weight
        for name in ("packed_data", "packed_scale", "packed_zero", "like"):
            delattr(self, name)
        for name in ("layout", "kept", "trainable"):
            self.__dict__.pop(name)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight = parameter

    def in_place(self) -> bool:
        return True

    def wants_gradients(self) -> bool:
        return False

    def forward(self, input: Tensor) -> Tensor:
        bias = _cast(self.bias, input)
        if len(self.layout[0]) == 2:
            return linear(input, self.packed, bias)
        biases = (None, None) if bias is None else bias.chunk(2)
        return torch.cat([linear(input, half(self.packed, i), biases[i]) for i in range(2)], -1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.unpacked_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = f"{prefix}weight"
        if name in state_dict:
            error_msgs.append(f"{name}: the model is accelerated and holds packed weights; load before accelerate()")
        others = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


Packed = SharedLinear | HeldLinear


class GatedMLP:
    """What a gated MLP's class becomes a subclass of: its forward is one op over the packed weights of its Linears.

    ``names``: the children that are gate, up and down; gate and up may be one child, whose first half is the gate.
    """

    names: tuple[str, str, str]
    activation: str
    gate_up: PackedWeight
    halves: tuple[PackedWeight, ...]  # as gate and up got them; none where they are one Linear

    @classmethod
    def convert(cls, module: nn.Module, names: tuple[str, str, str], activation: str) -> None:
        """``module``, whose Linears are converted already."""
        module.__dict__.update(names=names, activation=activation)
        module.__class__ = gated_class(type(module))
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
        self.gate_up = _with_static_addresses(packed)
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
            return self.gate_up.data is gate.packed.data
        return all(each.packed.data is own.data for each, own in zip((gate, up), self.halves, strict=True))

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        gate, up, down = self.linears()
        if args or kwargs or not all(_stands_for(each) for each in (gate, up, down)) or not self.stacked():
            return super().forward(hidden, *args, **kwargs)  # type: ignore[misc]  # the MLP's own class is the next
        biases = None
        if gate.bias is not None:
            biases = gate.bias.view(2, -1) if gate is up else torch.stack([gate.bias, up.bias])
        return gated_mlp(
            hidden, self.gate_up, down.packed, _cast(biases, hidden), _cast(down.bias, hidden),
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


def _blank(base: type[nn.Module]) -> nn.Module:
    kind = gated_class(base)
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
    """Whether ``model`` has modules of these classes."""
    return any(isinstance(module, Packed | GatedMLP) for module in model.modules())


def held_elements(module: nn.Module) -> int:
    """Of the weights in ``module`` that are no parameters."""
    return sum(each.in_features * each.out_features for each in module.modules() if isinstance(each, HeldLinear))


def held_bytes(module: nn.Module) -> int:
    """As ``held_elements``, bytes."""
    return sum(each.packed.nbytes for each in module.modules() if isinstance(each, HeldLinear))


def weight_of(linear: Any) -> Tensor:
    """(N, K), of a Linear of any kind; made anew where it is held packed."""
    return linear.unpacked_weight() if isinstance(linear, HeldLinear) else linear.weight


def packed_exactly(weight: Tensor) -> PackedWeight:
    """``pack(weight)`` without a copy of a weight that is stored that way already."""
    if weight.is_contiguous() and not any(size % LINE for size in weight.shape[-2:]):
        return PackedWeight(weight.detach(), tuple(weight.shape), 16)
    return pack(weight)


def half(packed: PackedWeight, index: int) -> PackedWeight:
    """The gate (0) or up (1) of a packed pair, as views."""
    parts = {name: getattr(packed, name) for name in ("data", "scale", "zero")}
    views = {name: None if tensor is None else tensor[index] for name, tensor in parts.items()}
    return replace(packed, shape=packed.shape[1:], **views)


def _rows(packed: PackedWeight) -> PackedWeight:
    """A pair stored without rows of padding as one matrix; a matrix as it is."""
    if len(packed.shape) == 2:
        return packed
    return replace(packed, data=packed.data.flatten(0, 1), shape=(2 * packed.rows, packed.columns))


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    """In the dtype of the input, which autocast may have changed."""
    return None if bias is None else bias.to(like.dtype)


def _with_static_addresses(packed: PackedWeight) -> PackedWeight:
    """Let CUDA graphs of torch.compile read the tensors where they are, as parameters, instead of copying them."""
    for tensor in (packed.data, packed.scale, packed.zero):
        if tensor is not None and tensor.is_cuda:
            torch._dynamo.mark_static_address(tensor)
    return packed
