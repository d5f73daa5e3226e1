"""Statistics of experts during a backward pass: each expert's products on the tokens that the router sends it.

The gradient of down's output carries the router's weight by itself; the router's own gradient stays in autograd.
A sequence without tokens of an expert is left out of the expert's launches and is zero in its sums. Inputs of down
count tokens that went elsewhere as zeros.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import saap_kernels
from saap.experts import Routing, grouped
from saap.record import BatchRecord

if TYPE_CHECKING:
    from saap.collector import Collector

INPUT_SUMS = ("sum", "square", "absmax", "abs")


class RecordedExperts(torch.autograd.Function):
    """``grouped`` products of one of the two tensors whose backward also reports (x, y, dx, dy) to ``sink``.

    As RecordedLinear: nothing of a weight's size is saved, and under autocast all that is reported has y's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: nn.Module, name: str, counts: list[int], sink: Callable[..., None], keep: bool
    ) -> Tensor:
        y = grouped(x, getattr(experts, name), counts)
        ctx.experts, ctx.name, ctx.counts, ctx.sink, ctx.dtype = experts, name, counts, sink, x.dtype
        ctx.save_for_backward(x.to(y.dtype), y if keep else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]  # one output
        x, y = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):  # kernels choose their own precision
            weight = getattr(ctx.experts, ctx.name)
            rows = zip(dy.split(ctx.counts), weight, strict=True)
            dx = torch.cat([part @ matrix.to(dy.dtype) for part, matrix in rows])
            ctx.sink(x, y, dx, dy.contiguous())
        return dx.to(ctx.dtype), None, None, None, None, None


class ExpertRecorder:
    """The forward of one layer's experts while a Collector is open."""

    def __init__(self, collector: "Collector", index: int, experts: Any) -> None:
        self.collector, self.index, self.experts = collector, index, experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        batch = self.collector.batch  # of this forward: by the time of its backward another may have begun
        routing = Routing(top_k_index, self.experts.down_proj.shape[0])
        call = _Call(self, batch, routing, top_k_weights.detach().flatten()[routing.order])
        return routing.run(self.experts, hidden_states, top_k_weights, call.gate_up, call.down)


class _Call:
    """One forward of one layer's experts, and what its backward reports."""

    def __init__(self, owner: ExpertRecorder, batch: BatchRecord | None, routing: Routing, weights: Tensor) -> None:
        self.collector, self.index, self.experts = owner.collector, owner.index, owner.experts
        self._batch, self.routing, self.weights = batch, routing, weights
        self._ranges: Tensor | None = None

    @property
    def batch(self) -> BatchRecord:
        if self._batch is None:
            raise RuntimeError("call begin(spans) before the forward pass of a micro-batch")
        return self._batch

    @property
    def ranges(self) -> Tensor:
        """(E, S, 2) rows of every expert by sequence; both products of a backward share them."""
        if self._ranges is None:
            self._ranges = self.routing.rows_of_sequences(self.batch.spans)
        return self._ranges

    def gate_up(self, x: Tensor) -> Tensor:
        return RecordedExperts.apply(x, self.experts, "gate_up_proj", self.routing.counts, self._gate_up, True)

    def down(self, x: Tensor) -> Tensor:
        y = RecordedExperts.apply(x, self.experts, "down_proj", self.routing.counts, self._down, False)
        dtype = torch.promote_types(y.dtype, torch.float32)
        self.outputs = torch.linalg.vector_norm(y.detach(), dim=1, dtype=dtype) * self.weights.abs()  # [n]
        return y

    def _gate_up(self, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> None:
        width = y.shape[1] // 2
        with saap_kernels.use_backend(self.collector.backend):
            lines = self._spread(saap_kernels.activation_salience(y, dy, self._spans()))  # [S, E, 2 F]
            for part, columns in (("gate", slice(0, width)), ("up", slice(width, 2 * width))):
                weight = self.experts.gate_up_proj[:, columns]
                self._put(part, lines[..., columns], x, dy[:, columns], weight, "out")

    def _down(self, x: Tensor, _y: None, dx: Tensor, dy: Tensor) -> None:
        batch = self.batch
        with saap_kernels.use_backend(self.collector.backend):
            lines, inputs = saap_kernels.activation_salience_statistics(x, dx, self._spans(), want=INPUT_SUMS)
            record = batch.layers[self.index]["mlp"]
            sums = self._spread(inputs).flatten(2)  # [4, S, E * F]
            # no shift: with zeros for tokens elsewhere the variance is not small beside the squared mean
            record.put_inputs(sums.new_zeros(sums.shape[-1]).double(), sums, batch.lengths(x.device), batch.tokens)
            self._put("down", self._spread(lines), x, dy, self.experts.down_proj, "in")
        record.sums["experts"] = self._routed(x.device)

    def _routed(self, device: torch.device) -> Tensor:
        """(2, E) means over the batch's tokens of g ||f(x)||, and of being routed to the expert; float64."""
        routed = (self.ranges[..., 1] - self.ranges[..., 0]).sum(1)  # [E]
        inside = self.routing.places(self.batch.spans) % 2  # 0 for padding
        parts = (self.outputs.double() * inside).split(self.routing.counts)
        sums = torch.stack([part.sum() for part in parts])
        return torch.stack([sums, routed.double().to(device)]) / self.batch.tokens

    def _spans(self) -> Tensor:
        """Every sequence of every expert that has rows, (P, 2): one launch takes them all."""
        found = self.ranges.flatten(0, 1)
        return found[found[:, 1] > found[:, 0]].int()

    def _spread(self, values: Tensor) -> Tensor:
        """(..., P, F) of the sequences of ``_spans`` -> (..., S, E, F), zero where an expert has no tokens."""
        experts, sequences = (self.ranges[..., 1] > self.ranges[..., 0]).nonzero().to(values.device).unbind(1)
        spread = values.new_zeros(*values.shape[:-2], self.ranges.shape[1], self.ranges.shape[0], values.shape[-1])
        spread[..., sequences, experts, :] = values
        return spread

    def _put(self, part: str, lines: Tensor, x: Tensor, dy: Tensor, weight: Tensor, axis: str) -> None:
        """Report a part of all experts at once; lines (S, E, F), weight (E, ...), x and dy rows of all experts."""
        collector, sequences = self.collector, lines.shape[0]
        element = lines.new_zeros(3, *lines.shape)
        coupled = lines.new_zeros(3, *lines.shape[1:]) if collector.coupled else None
        start = 0
        for expert, count in enumerate(self.routing.counts):
            own = self.ranges[expert]
            here = (own[:, 1] > own[:, 0]).nonzero().flatten()
            if len(here):
                rows = slice(start, start + count)
                spans = (own[here] - start).int()
                operands = x[rows], dy[rows], weight[expert].to(dy.dtype), spans
                options: dict[str, Any] = {"axis": axis, "scale": collector.scale}
                element[:, here.to(x.device), expert] = saap_kernels.weight_salience(*operands, **options)
                if coupled is not None:  # their means are over this expert's sequences
                    found = saap_kernels.coupled_salience(*operands, **options)
                    coupled[:, expert] = found * (len(here) / sequences)
            start += count
        record = self.batch.layers[self.index]["mlp"]
        record.put(
            part, lines.flatten(1).double() * collector.scale, element.flatten(2),
            None if coupled is None else coupled.flatten(1),
        )  # fmt: skip
