"""Linears that run the compacted-weight kernels, made from a model's own by changing their class.

Names, shapes and dtypes in the state dict stay.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saap_kernels import PackedWeight, linear, pack, unpack
from saap_kernels.packed import LINE

ALIGNMENT = 64  # bytes, of what torch allocates; weights in a mapped file may lie anywhere


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
        self.packed = with_static_addresses(packed)

    def restore(self) -> None:
        """The Linear that this was, with a weight of its own again."""
        if self.weight.untyped_storage().nbytes() != self.weight.nbytes:
            self.weight.data = self.weight.data.clone(memory_format=torch.contiguous_format)
        del self.packed
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def in_place(self) -> bool:
        """Whether the weight still is the packed one, and not another that somebody put in its stead."""
        # tracing cannot read addresses: a compiled model keeps to the weights as they were placed
        return torch.compiler.is_compiling() or self.weight.data_ptr() == self.packed.data.data_ptr()

    def wants_gradients(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def forward(self, input: Tensor) -> Tensor:
        if self.wants_gradients() or not self.in_place():
            return super().forward(input)
        return linear(input, _rows(self.packed), cast(self.bias, input))

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

    BUFFERS = ("qweight", "qscale", "qzero")  # by the first of these names peft finds the device of what it wraps
    PERSISTENT = False  # whether the state dict has them
    layout: tuple[tuple[int, ...], int, int | None]
    qweight: Tensor
    qscale: Tensor | None
    qzero: Tensor | None
    like: Tensor  # empty, of the weight's dtype
    kept: tuple[nn.Parameter, ...]
    trainable: bool

    @classmethod
    def convert(cls, module: nn.Linear, packed: PackedWeight, keep_weight: bool = False) -> None:
        """``keep_weight`` keeps the weight as it was, beside the packed one, for ``restore``."""
        weight = module.weight
        kept = (weight,) if keep_weight else ()
        module.__dict__.update(kept=kept, trainable=weight.requires_grad)
        module.weight = None  # type: ignore[assignment]  # a parameter may be absent
        like = torch.empty(0, dtype=weight.dtype, device=packed.data.device)
        module.register_buffer("like", like, persistent=False)
        module.__class__ = cls
        module.place(packed)  # type: ignore[operator]  # of this class from here on

    def place(self, packed: PackedWeight) -> None:
        """Keep these tensors as the weight."""
        self.layout = packed.shape, packed.bits, packed.group_size
        for name, tensor in zip(self.BUFFERS, (packed.data, packed.scale, packed.zero), strict=True):
            self.register_buffer(name, tensor, persistent=self.PERSISTENT)

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.qweight, *self.layout, self.qscale, self.qzero)

    def unpacked_weight(self) -> Tensor:
        """(N, K), the values that the kernels compute with, in the dtype of the model."""
        return unpack(self.packed, dtype=self.like.dtype).flatten(0, -2).contiguous()

    def restore(self) -> None:
        """The Linear that this was: with the weight it had if that was kept, else with the values of the packed one."""
        weight = self.kept[0].data.to(self.like) if self.kept else self.unpacked_weight()
        parameter = self.kept[0] if self.kept else nn.Parameter(weight, requires_grad=self.trainable)
        parameter.data = weight  # the kept one may be of another device or dtype
        for name in (*self.BUFFERS, "like"):
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
        bias = cast(self.bias, input)
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
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


Packed = SharedLinear | HeldLinear


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
    whole = weight.is_contiguous() and not any(size % LINE for size in weight.shape[-2:])
    if whole and not weight.data_ptr() % ALIGNMENT:
        return PackedWeight(weight.detach(), tuple(weight.shape), 16)
    return pack(weight)


def half(packed: PackedWeight, index: int) -> PackedWeight:
    """The gate (0) or up (1) of a packed pair, as views."""
    scale, zero = (None if each is None else each[index] for each in (packed.scale, packed.zero))
    return replace(packed, data=packed.data[index], shape=packed.shape[1:], scale=scale, zero=zero)


def _rows(packed: PackedWeight) -> PackedWeight:
    """A pair stored without rows of padding as one matrix; a matrix as it is."""
    if len(packed.shape) == 2:
        return packed
    return replace(packed, data=packed.data.flatten(0, 1), shape=(2 * packed.rows, packed.columns))


def cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    """In the dtype of the input, which autocast may have changed."""
    return None if bias is None else bias.to(like.dtype)


def with_static_addresses(packed: PackedWeight) -> PackedWeight:
    """Let CUDA graphs of torch.compile read the tensors where they are, as parameters, instead of copying them."""
    for tensor in (packed.data, packed.scale, packed.zero):
        if tensor is not None and tensor.is_cuda:
            torch._dynamo.mark_static_address(tensor)
    return packed
