"""A Linear, or a layer's experts, that lose input features: sums of what they then lack, and what makes up for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saap.hidden_states import CPU
from saap.least_squares import NormalEquations


@dataclass(frozen=True)
class Replacement:
    """The new ``weight`` (D, K) of a Linear's kept columns and ``bias`` (D,); None where it keeps its own.

    Of experts the weight is (E, D, K), of those that stay.
    """

    weight: Tensor | None
    bias: Tensor | None


class ThinnedLinear:
    """One Linear that loses input features: what is summed for it, and what becomes of it."""

    def __init__(self, linear: Any, kept: Tensor, name: str, method: str, precision: torch.dtype) -> None:
        self.linear, self.kept, self.name, self.least_squares = linear, kept, name, method == "least_squares"
        self.own = linear.weight.data  # as the model holds it, whatever it is brought in as
        self.precision = precision

    def open(self) -> None:
        """Start to sum; the weight is on the device from here on."""
        weight = self.linear.weight
        self.kept = self.kept.to(weight.device)
        removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        removed[self.kept] = False
        self.removed = removed.nonzero().flatten()
        self.stays, self.goes = (weight[:, part].to(self.precision).T for part in (self.kept, self.removed))
        self.equations = NormalEquations.zeros(
            len(self.kept) if self.least_squares else 0, weight.shape[0], weight.device
        )

    def missing(self, inputs: Tensor) -> NormalEquations:
        """Sums of a micro-batch against what the removed columns gave; inputs (B, T, F) of the dense Linear."""
        rows = inputs.flatten(0, -2)
        return self._sums(rows, rows[:, self.removed].to(self.precision) @ self.goes)

    def gap(self, inputs: Tensor, outputs: Tensor) -> NormalEquations:
        """Sums of a micro-batch against what other ``inputs`` lack of the dense Linear's ``outputs`` (B, T, D)."""
        rows = inputs.flatten(0, -2)
        wanted = outputs.flatten(0, -2).to(self.precision)
        if self.linear.bias is not None:
            wanted = wanted - self.linear.bias
        return self._sums(rows, wanted - rows[:, self.kept].to(self.precision) @ self.stays)

    def merge_(self, sums: NormalEquations) -> None:
        """Add the sums of a micro-batch."""
        self.equations.merge_(sums)

    def _sums(self, rows: Tensor, residual: Tensor) -> NormalEquations:
        kept = self.kept if self.least_squares else self.kept[:0]  # a bias is a least-squares problem without inputs
        return NormalEquations.of(rows[:, kept].to(self.precision), residual)

    def solved(self, damping: float | str, caution: float = 1.0) -> Replacement:
        """The Linear's new weight and bias; frees the sums."""
        self.equations.all_reduce()
        affine = self.linear.bias is not None or not self.least_squares
        if not self.equations.tokens:  # an expert that none was routed to
            return Replacement(self.own[:, self.kept.to(self.own.device)].to(CPU), None)
        change, shift = self.equations.solve(damping, affine, self.name, caution)
        del self.equations, self.stays, self.goes
        weight, bias = None, None
        if self.least_squares:
            own = self.own[:, self.kept.to(self.own.device)].to(CPU, torch.float64)
            weight = (own + change.to(CPU)).to(self.own.dtype)
        if affine:
            old = 0.0 if self.linear.bias is None else self.linear.bias.to(CPU, torch.float64)
            bias = (shift.to(CPU) + old).to(self.own.dtype)
        for new in (weight, bias):
            if new is not None and not torch.isfinite(new).all():
                raise ValueError(f"compensation of {self.name} overflows {self.own.dtype}; use a larger damping")
        return Replacement(weight, bias)

    def forward(self, new: Replacement) -> Callable[[Tensor], Tensor]:
        """The Linear as it will be, on inputs of all features."""
        like = self.linear.weight
        weight = like[:, self.kept] if new.weight is None else new.weight.to(like)
        bias = self.linear.bias if new.bias is None else new.bias.to(like)
        return lambda inputs: F.linear(inputs[..., self.kept], weight, bias)


class ThinnedExperts:
    """The down matrices of the experts of one layer that stay, each summed over the tokens that are routed to it."""

    def __init__(self, targets: dict[int, ThinnedLinear]) -> None:
        """{expert: its down matrix}, in the order in which they stay."""
        self.targets = targets

    def open(self) -> None:
        """Start to sum; the weights are on the device from here on."""
        for target in self.targets.values():
            target.open()

    def missing(self, inputs: Sequence[Tensor]) -> list[NormalEquations]:
        """As of one Linear; inputs (T_e, F) of every expert."""
        return [target.missing(inputs[expert]) for expert, target in self.targets.items()]

    def merge_(self, sums: list[NormalEquations]) -> None:
        """Add the sums of a micro-batch."""
        for target, own in zip(self.targets.values(), sums, strict=True):
            target.merge_(own)

    def solved(self, damping: float | str) -> Replacement:
        """The new weights (E, D, K); frees the sums."""
        found = [target.solved(damping).weight for target in self.targets.values()]
        return Replacement(torch.stack([weight for weight in found if weight is not None]), None)
