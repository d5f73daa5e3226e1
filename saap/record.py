"""What one micro-batch's backward pass reports: a Linear that hands its operands on, and per-sequence sums."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saap.moments import Moments
from saap.statistics import ORDERS
from saap.units import LayerUnits


class RecordedLinear(torch.autograd.Function):
    """y = x W' + b whose backward also reports (x, y, dx, dy), flattened to rows, to ``sink``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Linear, sink: Callable[..., None], keep_output: bool) -> Tensor:
        y = F.linear(x, linear.weight, linear.bias)
        ctx.linear, ctx.sink = linear, sink
        ctx.save_for_backward(x, y if keep_output else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        dx = dy @ ctx.linear.weight
        ctx.sink(x.flatten(0, -2), None if y is None else y.flatten(0, -2), dx.flatten(0, -2), dy.flatten(0, -2))
        return dx, None, None, None


class LayerRecord:
    """Per-sequence sums of one layer and one module while a micro-batch runs backward."""

    def __init__(self, matrices: tuple[str, ...], units: int, sequences: int, coupled: bool) -> None:
        self.matrices = matrices
        self.vector = torch.zeros(sequences, len(matrices), units, dtype=torch.float64)  # [S, M, U]
        self.element = torch.zeros(len(ORDERS), sequences, len(matrices), units, dtype=torch.float64)  # [3, S, M, U]
        self.coupled = torch.zeros(len(ORDERS), len(matrices), units, dtype=torch.float64) if coupled else None
        self.seen: set[str] = set()
        self.inputs: tuple[Tensor, Tensor] | None = None  # shift (C,), sums (4, S, C) of the input of o or down

    def put(self, part: str, vector: Tensor, element: Tensor, coupled: Tensor | None) -> None:
        if part in self.seen:
            raise RuntimeError(f"a second backward pass reached {part}: run one backward per forward")
        column = self.matrices.index(part)
        self.vector[:, column] = vector
        self.element[:, :, column] = element
        if self.coupled is not None:
            assert coupled is not None  # a collector measures it in every layer or in none
            self.coupled[:, column] = coupled
        self.seen.add(part)

    def nonfinite(self) -> tuple[str, int] | None:
        """The first (part, sequence) in backward order whose sums are NaN or inf."""
        finite = torch.isfinite(self.vector).all(-1) & torch.isfinite(self.element).all(-1).all(0)  # [S, M]
        for column in reversed(range(len(self.matrices))):
            if not finite[:, column].all():
                return self.matrices[column], int(finite[:, column].int().argmin())
        return None

    def moments(self) -> Moments:
        """Moments of (3, P, U) with the aggregate rows "joint" and "sum" appended."""
        per_matrix = vector_orders(self.vector)  # [3, S, M, U]
        joint = vector_orders(self.vector.sum(1, keepdim=True))
        vector = torch.cat([per_matrix, joint, per_matrix.sum(2, keepdim=True)], 2)
        total = self.element.sum(2, keepdim=True)
        element = torch.cat([self.element, total, total], 2)
        return Moments.of(vector.movedim(1, 0), element.movedim(1, 0))


def vector_orders(signed: Tensor) -> Tensor:
    """|a|, a^2 and |a - a^2 / 2| stacked in front: (...) -> (3, ...), method section 2a."""
    square = signed.square()
    return torch.stack([signed.abs(), square, (signed - 0.5 * square).abs()])


class BatchRecord:
    """The sequences of one forward pass and what its backward pass reported, by layer and module."""

    def __init__(
        self, spans: Tensor, layers: dict[int, LayerUnits], matrices: dict[str, tuple[str, ...]], coupled: bool
    ) -> None:
        self.spans = spans
        self.lengths = (spans[:, 1] - spans[:, 0]).double()  # tokens of each sequence
        self.tokens = int(self.lengths.sum())
        self.indices = tuple(layers)
        self._real: Tensor | None = None  # rows of all sequences, where the hidden states are
        self._influence: dict[int, Tensor] = {}
        self.layers = {
            (index, name): LayerRecord(parts, sizes.count(name), len(spans), coupled)
            for index, sizes in layers.items()
            for name, parts in matrices.items()
            if sizes.count(name)
        }

    @torch.no_grad()
    def note_influence(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Keep the mean over tokens of 1 - cos(before, after) of a layer's hidden states (B, T, D)."""
        dtype = torch.promote_types(before.dtype, torch.float32)
        cosine = F.cosine_similarity(before.to(dtype), after.to(dtype), dim=-1).flatten()
        if self._real is None or self._real.device != cosine.device:
            self._real = torch.cat([torch.arange(a, b) for a, b in self.spans.tolist()]).to(cosine.device)
        self._influence[layer] = 1 - cosine[self._real].mean(dtype=torch.float64)

    def influence(self, layer: int) -> float:
        """What ``note_influence`` kept of a layer."""
        return float(self._influence[layer])

    @property
    def started(self) -> bool:
        return any(record.seen for record in self.layers.values())

    @property
    def complete(self) -> bool:
        return all(len(record.seen) == len(record.matrices) for record in self.layers.values())

    def check(self) -> None:
        """Raise RuntimeError where no gradient arrived, ValueError where it was not finite, naming the place."""
        for (index, name), record in sorted(self.layers.items(), key=lambda item: item[0], reverse=True):
            missing = set(record.matrices) - record.seen
            if missing:
                raise RuntimeError(
                    f"layer {index}: no gradient reached {', '.join(sorted(missing))}; was backward run?"
                )
            bad = record.nonfinite()
            if bad is not None:
                part, sequence = bad
                raise ValueError(
                    f"expected finite gradients, found NaN or inf in layer {index}, {name} ({part}), "
                    f"sequence {sequence} of the micro-batch"
                )
