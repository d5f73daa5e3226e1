"""What a criterion returns: one importance per unit, and how much it fluctuates over sequences."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saap.units import MODULES, Units


@dataclass(frozen=True)
class Scores:
    """One importance per unit, (U,) float64 per module, layers one after another; lowest goes first.

    ``fluctuation`` {module: (U,)} is the standard deviation of the importance over sequences divided by its
    mean (method section 2c), or None where the criterion is not measured per sequence. ``experts`` (X,) is the
    router-weighted importance of whole experts, of all layers one after another, which ``score`` adds.
    """

    units: Units
    attention: Tensor
    mlp: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    fluctuation: dict[str, Tensor] | None = None
    experts: Tensor | None = None

    def __post_init__(self) -> None:
        for module in MODULES:
            self._check(module, getattr(self, module), "scores")
            if self.fluctuation is not None:
                self._check(module, self.fluctuation[module], "fluctuation")
        if self.experts is not None:
            self._check("expert", self.experts, "importances", self.units.expert_offsets()[-1])

    @classmethod
    def of(
        cls,
        units: Units,
        values: Sequence[Tensor],
        settings: dict[str, Any],
        fluctuation: dict[str, Tensor] | None = None,
    ) -> "Scores":
        """Scores from one (U,) tensor per module, in the order of ``MODULES``."""
        attention, mlp = values
        return cls(units, attention, mlp, settings, fluctuation)

    def _check(self, module: str, values: Tensor, what: str, count: int | None = None) -> None:
        wanted = (self.units.count(module) if count is None else count,)
        if tuple(values.shape) != wanted:
            raise ValueError(f"expected {module} {what} of shape {wanted}, got {tuple(values.shape)}")
        if not torch.isfinite(values).all():
            raise ValueError(f"expected finite {module} {what}, found NaN or inf")

    def layer(self, index: int, module: str) -> Tensor:
        """The scores of one layer's units, (U_l,)."""
        offsets = self.units.offsets(module)
        return getattr(self, module)[offsets[index] : offsets[index + 1]]


def check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
