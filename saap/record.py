"""What one micro-batch's backward pass reports: a Linear that hands its operands on, and per-sequence sums."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saap.families import Projection
from saap.host import CPU, on_host
from saap.moments import Moments

MOMENT_BYTES = 64 << 20  # of one of the few temporaries that moments of many sequences and units need


class RecordedLinear(torch.autograd.Function):
    """y = x W' + b whose backward also reports (x, y, dx, dy), flattened to rows, to ``sink``.

    Under autocast the product is computed in another dtype than x or W have: everything reported, x included, has
    the dtype of y, and ``operands`` gives W and b as the product took them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Linear, sink: Callable[..., None], keep_output: bool) -> Tensor:
        y = F.linear(x, linear.weight, linear.bias)
        ctx.linear, ctx.sink, ctx.dtype = linear, sink, x.dtype
        ctx.save_for_backward(x.to(y.dtype), y if keep_output else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):  # kernels choose their own precision
            dx = dy @ operands(ctx.linear, dy.dtype)[0]
            ctx.sink(x.flatten(0, -2), None if y is None else y.flatten(0, -2), dx.flatten(0, -2), dy.flatten(0, -2))
        return dx.to(ctx.dtype), None, None, None


def operands(linear: nn.Linear | Projection, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype that a product was computed in: themselves, but under autocast."""
    return linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)


class LayerRecord:
    """One layer and one module of a micro-batch: what each part reported, and once all have, moments over sequences.

    ``sums``, float64 where the gradients are until ``BatchRecord.take`` brings them to the CPU: "finite" (S, M),
    1 or 0; "signed" (M, U), the mean of the signed sums; the fields of Moments of (3, P, U), P as in
    ModuleStatistics; "coupled" (4, M, U) if measured; "input_mean", "input_m2", "input_activity" and "input_absmax"
    (C,) of the input of o or down over the tokens.
    """

    def __init__(self, matrices: tuple[str, ...]) -> None:
        self.matrices = matrices
        self.seen: set[str] = set()
        self.sums: dict[str, Tensor] = {}
        self._parts: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
        self._joined: tuple[Tensor, Tensor, Tensor] | None = None  # of all parts, by sequence

    def put(self, part: str, lines: Tensor, element: Tensor, coupled: Tensor | None = None) -> None:
        """Signed sums (S, L) of a part's rows or columns; element-wise (3, S, U) and coupled (3, U) sums by unit."""
        if part in self.seen:
            raise RuntimeError(f"a second backward pass reached {part}: run one backward per forward")
        by_unit = lines.double().unflatten(1, (element.shape[-1], -1))  # [S, U, lines of a unit]
        if coupled is not None:
            coupled = torch.cat([coupled.double(), by_unit.mean(0).abs().sum(-1)[None]])
        self._parts[part] = by_unit.sum(2), vector_orders(by_unit).sum(3), element, coupled
        self.seen.add(part)
        if self.complete:
            self._join()
            if lines.device != CPU:  # where memory is short: moments do not grow with the sequences
                self.reduce()

    def put_inputs(self, shift: Tensor, sums: Tensor, lengths: Tensor, tokens: int) -> None:
        """Sums (4, S, C) over each sequence's tokens of the input of o or down, the first two about ``shift`` (C,).

        ``lengths`` (S,) are the sequences' tokens, on the device of the others, and ``tokens`` their sum.
        """
        sums = sums.double()
        total, square = sums[:2].sum(1)  # each [C]
        mean = total / tokens
        self.sums["input_mean"] = mean + shift
        self.sums["input_m2"] = (square - total * mean).clamp_min(0)
        self.sums["input_activity"] = (sums[3] / lengths[:, None]).square().mean(0)
        self.sums["input_absmax"] = sums[2].amax(0)

    @property
    def complete(self) -> bool:
        return len(self.seen) == len(self.matrices)

    def _join(self) -> None:
        parts = [self._parts.pop(name) for name in self.matrices]
        signed = torch.stack([part[0] for part in parts], 1)  # [S, M, U]
        kinds = [part[1] for part in parts], [part[2] for part in parts]
        vector, element = (torch.stack([each.double() for each in kind], 2) for kind in kinds)  # [3, S, M, U]
        self.sums["finite"] = torch.isfinite(signed).all(-1) & torch.isfinite(element).all(-1).all(0)
        self.sums["signed"] = signed.mean(0)
        if parts[0][3] is not None:
            self.sums["coupled"] = torch.stack([part[3] for part in parts if part[3] is not None], 1)
        self._joined = signed, vector, element

    def reduce(self) -> None:
        """Moments in place of the sequences' sums, once all parts have reported."""
        if self._joined is None:
            return
        units = max(1, MOMENT_BYTES // (self._joined[1][..., 0].numel() * 8))
        pieces = zip(*(each.split(units, -1) for each in self._joined), strict=True)
        self.sums |= Moments.cat([_moments(*piece) for piece in pieces]).tensors()
        self._joined = None

    def moments(self, sequences: int) -> Moments:
        """Moments of (3, P, U), rows as in ModuleStatistics."""
        return Moments(sequences, *(self.sums[name] for name in Moments.FIELDS))


def _moments(signed: Tensor, vector: Tensor, element: Tensor) -> Moments:
    """Moments with the rows "joint", "sum" and "mask" behind those of the matrices."""
    joint, mask = vector_orders(signed.sum(1, keepdim=True)), vector_orders(signed[:, -1:])  # [3, S, 1, U]
    orders = torch.cat([vector, joint, vector.sum(2, keepdim=True), mask], 2)
    total = element.sum(2, keepdim=True)
    return Moments.of(orders.movedim(1, 0), torch.cat([element, total, total, element[:, :, -1:]], 2).movedim(1, 0))


def vector_orders(signed: Tensor) -> Tensor:
    """|a|, a^2 and |a - a^2 / 2| stacked in front: (...) -> (3, ...), method section 2a."""
    square = signed.square()
    return torch.stack([signed.abs(), square, (signed - 0.5 * square).abs()])


class BatchRecord:
    """The sequences of one forward pass and what its backward pass reported, by layer and module."""

    def __init__(self, spans: Tensor, matrices: dict[int, dict[str, tuple[str, ...]]]) -> None:
        """``spans`` (S, 2) of the sequences; {layer: {module: its parts}} of what will report."""
        self.spans = spans
        self._lengths = (spans[:, 1] - spans[:, 0]).double()  # tokens of each sequence
        self.tokens = int(self._lengths.sum())
        self._there: dict[tuple[str, torch.device], Tensor] = {}
        self._influence: dict[int, Tensor] = {}
        self.layers = {i: {name: LayerRecord(parts) for name, parts in found.items()} for i, found in matrices.items()}

    def there(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives on the CPU, on a device: in one transfer for all layers, because each waits."""
        if (name, device) not in self._there:
            self._there[name, device] = make().to(device)
        return self._there[name, device]

    def lengths(self, device: torch.device) -> Tensor:
        """Tokens of each sequence, (S,) float64."""
        return self.there("lengths", device, lambda: self._lengths)

    @torch.no_grad()
    def note_influence(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Keep the mean over tokens of 1 - cos(before, after) of a layer's hidden states (B, T, D)."""
        dtype = torch.promote_types(before.dtype, torch.float32)
        cosine = F.cosine_similarity(before.to(dtype), after.to(dtype), dim=-1).flatten()
        rows = self.there(
            "rows", cosine.device, lambda: torch.cat([torch.arange(a, b) for a, b in self.spans.tolist()])
        )
        self._influence[layer] = 1 - cosine[rows].mean(dtype=torch.float64)

    def take(self, layer: int) -> float:
        """Bring a complete layer's sums to the CPU, in one transfer; returns what ``note_influence`` kept of it."""
        records = list(self.layers[layer].values())
        for record in records:
            record.reduce()
        moved = iter(on_host([self._influence[layer], *(each for record in records for each in record.sums.values())]))
        influence = float(next(moved))
        for record in records:
            record.sums = {name: next(moved) for name in record.sums}
        return influence

    @property
    def started(self) -> bool:
        return any(record.seen for modules in self.layers.values() for record in modules.values())

    @property
    def complete(self) -> bool:
        return all(record.complete for modules in self.layers.values() for record in modules.values())

    def check(self) -> None:
        """Raise RuntimeError where no gradient arrived, ValueError where it was not finite, naming the place.

        Reads all flags from the device at once.
        """
        records = [
            (index, name, record)
            for index, modules in sorted(self.layers.items(), reverse=True)
            for name, record in sorted(modules.items(), reverse=True)
        ]
        flags = iter(on_host([record.sums["finite"] for _, _, record in records if record.complete]))
        for index, name, record in records:
            missing = set(record.matrices) - record.seen
            if missing:
                raise RuntimeError(
                    f"layer {index}: no gradient reached {', '.join(sorted(missing))}; was backward run?"
                )
            finite = next(flags)  # [S, M]
            for column in reversed(range(len(record.matrices))):  # in backward order
                if not finite[:, column].all():
                    raise ValueError(
                        f"expected finite gradients, found NaN or inf in layer {index}, {name} "
                        f"({record.matrices[column]}), sequence {int(finite[:, column].argmin())} of the micro-batch"
                    )
