"""Running mean, squared deviation and cross moment over sequences, mergeable in any order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Moments over ``count`` sequences of paired quantities, vector-wise and element-wise.

    Means and ``*_m2``, the sums of squared deviations from them, are float64 of one shape (O, ...), O orders;
    ``cross`` (O, O, ...) is the sum of products of deviations, the vector's order first. Variances are
    ``m2 / (count - 1)``. Merges follow Chan, Golub and LeVeque (1983): exact but for rounding, in any order.
    """

    count: int
    vector_mean: Tensor
    vector_m2: Tensor
    element_mean: Tensor
    element_m2: Tensor
    cross: Tensor

    FIELDS = ("vector_mean", "vector_m2", "element_mean", "element_m2", "cross")

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Moments":
        shapes = [shape] * (len(cls.FIELDS) - 1) + [(shape[0], *shape)]
        return cls(0, *(torch.zeros(each, dtype=torch.float64) for each in shapes))

    @classmethod
    def of(cls, vector: Tensor, element: Tensor) -> "Moments":
        """Moments of per-sequence values; vector and element are (S, O, ...)."""
        vector_mean, element_mean = vector.mean(0), element.mean(0)
        vector_dev, element_dev = vector - vector_mean, element - element_mean
        return cls(
            len(vector),
            vector_mean,
            vector_dev.square().sum(0),
            element_mean,
            element_dev.square().sum(0),
            torch.stack([(vector_dev[:, order, None] * element_dev).sum(0) for order in range(vector.shape[1])]),
        )

    @classmethod
    def cat(cls, parts: "Sequence[Moments]") -> "Moments":
        """Moments of the same sequences for the units of all ``parts``, along the last dimension."""
        if len(parts) == 1:
            return parts[0]
        return cls(parts[0].count, *(torch.cat([getattr(part, name) for part in parts], -1) for name in cls.FIELDS))

    def narrow(self, start: int, length: int) -> "Moments":
        """A view of ``length`` units from ``start`` along the last dimension."""
        return Moments(self.count, *(getattr(self, name).narrow(-1, start, length) for name in self.FIELDS))

    def select(self, units: Tensor) -> "Moments":
        """A copy of the given units, (n,) int64, along the last dimension."""
        return Moments(self.count, *(tensor[..., units] for tensor in self.tensors().values()))

    def merge_(self, other: "Moments") -> None:
        """Add the sequences of ``other``; writes into this object's tensors."""
        if not other.count:
            return
        total = self.count + other.count
        vector_gap = other.vector_mean - self.vector_mean
        element_gap = other.element_mean - self.element_mean
        weight = self.count * other.count / total
        self.vector_m2 += other.vector_m2 + vector_gap.square() * weight
        self.element_m2 += other.element_m2 + element_gap.square() * weight
        self.cross += other.cross + vector_gap[:, None] * element_gap * weight
        self.vector_mean += vector_gap * (other.count / total)
        self.element_mean += element_gap * (other.count / total)
        self.count = total

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.FIELDS}
