"""Linears that a quantised checkpoint holds: run on the kernels, saved and loaded in its stored form."""

from typing import Any

import torch
from torch import Tensor, nn

from saap.packed_linear import HeldLinear, half
from saap.stored_weight import NAMES, empty_packed, from_stored, stored_shapes, to_stored
from saap_kernels import PackedWeight


class QuantisedLinear(HeldLinear):
    """A Linear whose weight exists as int8 or int4 only, in ``saap_kernels``' layout; there is one copy of it.

    The state dict has ``qweight``, ``qscale`` and ``qzero`` as ``saap.stored_weight`` describes them, made anew from
    the packed weight, exact. ``weight`` is None, so that nothing can change a copy in vain; ``unpacked_weight()``
    makes (N, K). Differentiable in the input, and in scale and zero where they require gradients. A change of dtype
    reaches scale, zero and bias.
    """

    blank: bool = False  # on the meta device, or while it is loaded: its buffers have the sizes of the stored form
    PERSISTENT = True  # transformers empties buffers that no state dict has when it has loaded the others

    @classmethod
    def convert_blank(cls, module: nn.Linear, bits: int, group_size: int) -> None:
        """``module`` without values, on the meta device: its state dict has the sizes of the stored form."""
        dtype = torch.float32 if module.weight.dtype == torch.float64 else module.weight.dtype
        shape = module.out_features, module.in_features
        packed = empty_packed(shape, bits, group_size, dtype)
        cls.convert(module, packed)
        for name, size in stored_shapes(shape, bits, group_size).items():
            kind = packed.data.dtype if name == "qweight" else dtype
            module.register_buffer(name, torch.empty(size, dtype=kind, device="meta"))
        module.__dict__["blank"] = True

    @property
    def packed(self) -> PackedWeight:
        if not self.blank:
            return super().packed
        _, bits, group_size = self.layout
        assert group_size is not None
        dtype = (self.like if self.qscale is None else self.qscale).dtype
        return empty_packed((self.out_features, self.in_features), bits, group_size, dtype)

    def pack_stored(self, name: str) -> None:
        """Lay out the stored form that loading has left in the buffers; ValueError names what does not fit."""
        stored: dict[str, Tensor] = {each: getattr(self, each) for each in NAMES}
        absent = next((each for each, tensor in stored.items() if tensor.is_meta), None)
        if absent is not None:
            raise ValueError(f"the checkpoint has no {name}.{absent}")
        packed = self._packed_from(stored, name)
        self.blank = False
        self.place(packed)

    def _packed_from(self, stored: dict[str, Tensor], name: str) -> PackedWeight:
        _, bits, group_size = self.layout
        assert group_size is not None
        wanted = stored_shapes((self.out_features, self.in_features), bits, group_size)
        for each, tensor in stored.items():
            if tuple(tensor.shape) != wanted[each]:
                raise ValueError(
                    f"{name}.{each}: expected shape {wanted[each]} for {bits} bits in groups of {group_size}, "
                    f"got {tuple(tensor.shape)}"
                )
        for each in ("qscale", "qzero"):
            if not bool(stored[each].isfinite().all()):
                raise ValueError(f"{name}.{each}: expected finite values, found NaN or inf")
        try:
            return from_stored(stored, self.in_features, bits, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def stored(self) -> dict[str, Tensor]:
        """The three tensors of a checkpoint."""
        if self.blank:
            return {name: getattr(self, name) for name in NAMES}
        if len(self.layout[0]) == 2:
            return to_stored(self.packed)
        parts = [to_stored(half(self.packed, index)) for index in range(2)]
        return {name: torch.cat([part[name] for part in parts]) for name in NAMES}

    def as_pair(self) -> None:
        """Hold gate and up, the halves of the rows, as the ops for gated MLPs read them."""
        _, bits, group_size = self.layout
        assert group_size is not None
        stored = self.stored()
        halves = [
            from_stored({name: stored[name].chunk(2)[index] for name in NAMES}, self.in_features, bits, group_size)
            for index in range(2)
        ]
        data, scale, zero = (
            torch.stack([getattr(each, name) for each in halves]) for name in ("data", "scale", "zero")
        )
        self.place(PackedWeight(data, (2, *halves[0].shape), bits, group_size, scale, zero))

    def as_matrix(self) -> None:
        """Take ``as_pair`` back."""
        if len(self.layout[0]) == 3:
            _, bits, group_size = self.layout
            assert group_size is not None
            self.place(from_stored(self.stored(), self.in_features, bits, group_size))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        keys = {f"{prefix}{name}": name for name in NAMES}
        given = {name: state_dict[key] for key, name in keys.items() if key in state_dict}
        others = {key: value for key, value in state_dict.items() if key not in keys and key != f"{prefix}weight"}
        absent: list[str] = []
        nn.Module._load_from_state_dict(
            self, others, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs
        )
        missing_keys.extend(key for key in absent if keys.get(key) not in given)
        if f"{prefix}weight" in state_dict:
            error_msgs.append(f"{prefix}weight: the model is quantised and takes {', '.join(NAMES)} instead")
        if len(given) == len(NAMES):
            try:
                packed = self._packed_from(given, prefix.removesuffix("."))
            except ValueError as error:
                error_msgs.append(str(error))
            else:
                self.place(_like(packed, self.packed))


def _like(packed: PackedWeight, old: PackedWeight) -> PackedWeight:
    """On the device of ``old``, scale and zero in its dtype."""
    assert old.scale is not None and packed.scale is not None and packed.zero is not None
    scale, zero = packed.scale.to(old.scale), packed.zero.to(old.scale)
    return PackedWeight(packed.data.to(old.data.device), packed.shape, packed.bits, packed.group_size, scale, zero)


def is_quantised(model: nn.Module) -> bool:
    """Whether ``model`` has modules of this kind."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())
