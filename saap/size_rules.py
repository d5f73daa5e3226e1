"""Which sizes of a layer are allowed: for a number of devices that share it, and for the runtime it is made for."""

import math
from dataclasses import dataclass

from saap.tensor_parallel import check_devices, check_split, described, size_of, splits
from saap.units import LayerUnits


@dataclass(frozen=True)
class SizeRule:
    """What the sizes of every layer must satisfy, those among them that a search leaves alone.

    ``devices`` can share every layer (``saap.tensor_parallel.splits``). In what each of them holds, the width of the
    MLP, or of each expert, is a multiple of ``width_multiple``, and so are the elements in a row of o, query heads *
    head_dim, of ``row_multiple``. ``empty`` says whether a layer may lack its attention or its MLP. ``target`` is the
    runtime that asks for all but the devices.
    """

    devices: int = 1
    width_multiple: int = 1
    row_multiple: int = 1
    empty: bool = True
    target: str = ""

    def __post_init__(self) -> None:
        check_devices(self.devices)

    @property
    def name(self) -> str:
        """Who asks, as the options of a search."""
        asked = [f"target={self.target!r}"] if self.target else []
        return " with ".join(asked + ([f"tensor_parallel={self.devices}"] if self.devices > 1 else []))

    def wanted(self, sizes: LayerUnits, module: str, kept: int) -> str | None:
        """What the target expects of one layer's ``module`` instead of ``kept`` KV heads, or channels of each expert.

        None where ``kept`` satisfies it; the devices are ``splits``' matter.
        """
        if not kept:
            least = "KV head" if module == "attention" else "channel"
            return None if self.empty else f"at least one {least} in every layer"
        if module == "mlp":
            each, row = self.width_multiple, kept
        else:
            each, row = self.row_multiple, kept * sizes.group * sizes.head_dim
        if row % (each * self.devices) == 0:
            return None
        shared = f", {each} for each of {self.devices} devices" if self.devices > 1 else ""
        wanted = f"a multiple of {each * self.devices}{shared}"
        return wanted if module == "mlp" else f"query heads * head_dim to be {wanted}, got {row}"

    def allows(self, sizes: LayerUnits, module: str, kept: int) -> bool:
        """Whether one layer's ``module`` may keep ``kept`` KV heads, or channels of each expert."""
        return splits(sizes, module, kept, self.devices) and self.wanted(sizes, module, kept) is None

    def check(self, sizes: LayerUnits, layer: int, module: str, kept: int, why: str = "") -> None:
        """Raise ValueError, naming the layer and its sizes, unless ``allows``."""
        check_split(sizes, layer, module, kept, self.devices, why)
        wanted = self.wanted(sizes, module, kept)
        if wanted is not None:
            has = described(sizes, module, kept)
            raise ValueError(f"layer {layer}: target={self.target!r} does not take {has}{why}; expected {wanted}")


def allowed_counts(
    sizes: LayerUnits, module: str, multiple: int, rule: SizeRule | None = None, *, allow_empty: bool = False
) -> list[int]:
    """How many KV heads, or channels of each expert, a layer may keep, falling from what it has, if it may keep that.

    All satisfy ``rule``; fewer channels than the layer has are a multiple of ``multiple`` too. None of either is
    allowed with ``allow_empty`` only, or where there is none.
    """
    rule = rule or SizeRule()
    count, least = size_of(sizes, module), 0 if allow_empty else 1
    step = 1 if module == "attention" else math.lcm(multiple, rule.width_multiple * rule.devices)
    fewer = range((count - 1) // step * step, least - 1, -step)
    return [kept for kept in (count, *fewer) if rule.allows(sizes, module, kept)]
