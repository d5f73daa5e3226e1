"""Block streaming: calibrate a model larger than the device, one decoder block on it at a time.

The loops over sequences and blocks change places. Forward, each block is brought in once and reads all
sequences; its inputs stay on the host or on disk. Backward, each block is brought in once more, runs
forward again from its saved input and backward from the gradient of its output. Per block the operations
and their order are those of activation checkpointing, so the statistics are the same.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saap.blocks import Blocks, outside, tensors_of
from saap.collector import Collector
from saap.families import family_of, layers_of
from saap.hidden_states import CPU, HiddenStates
from saap.loss import backward_sequence_losses, sequence_spans
from saap.memory import available_bytes, weight_bytes
from saap.micro_batches import Progress
from saap.refuse import refuse_nonfinite_layer


@dataclass(frozen=True)
class Streaming:
    """How blocks are streamed: the ``device`` that computes (None: the current CUDA device if there is one,
    otherwise the model's), the ``dtype`` weights are brought in as (None: their own), and the ``folder`` for
    hidden states (None: memory, or the folder for temporary files when they are large)."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    folder: str | os.PathLike[str] | None = None

    def resolved_device(self, model: PreTrainedModel) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return model.device


def resolve_streaming(model: PreTrainedModel, stream: "bool | str | Streaming") -> Streaming | None:
    """The given Streaming, the default one for True, or None for no streaming.

    "auto" streams a model in host memory or in mapped files that takes more than nine tenths of the memory
    of the CUDA device, if there is one, or otherwise of the host.
    """
    if isinstance(stream, Streaming):
        return stream
    if stream not in (True, False, "auto"):
        raise ValueError(f'stream must be True, False, "auto" or a saap.Streaming; got {stream!r}')
    if stream == "auto":
        device = Streaming().resolved_device(model)
        stream = model.device.type == "cpu" and weight_bytes(model) > 0.9 * available_bytes(device)
    return Streaming() if stream else None


def progress_unit(stream: "bool | str | Streaming | None") -> str:
    """What ``calibrate``'s progress counts."""
    return "sequences x blocks" if isinstance(stream, Streaming) else "sequences"


def stream_collect(
    collector: Collector, ids: Tensor, batch: int, streaming: Streaming, progress: Progress | None = None
) -> None:
    """Collect the statistics of ids (N, T) through an open collector made with ``read_weights=False``.

    ``batch`` sequences are on the device at a time. ``progress(done, total)`` counts sequences times blocks,
    forward and backward. Raises ValueError naming the block whose weights, output or gradients are not
    finite, and OSError when the folder has no room for the hidden states.
    """
    run = _Run(collector, ids, batch, streaming, progress)
    try:
        run.embed()
        for index in range(run.count):
            run.forward(index)
        run.head()
        for index in reversed(range(run.count)):
            run.backward(index)
    finally:
        run.states.close()


class _Run(Blocks):
    """One pass of all sequences; methods in the order they are called."""

    def __init__(
        self, collector: Collector, ids: Tensor, batch: int, streaming: Streaming, progress: Progress | None
    ) -> None:
        model, family = collector.model, collector.family
        count = len(layers_of(model, family))
        shape = (*ids.shape, collector.statistics.units.layers[0].hidden_size)
        # inputs of the blocks, output of the last one, gradient of the output of the block that runs backward
        states = HiddenStates(count + 2, shape, streaming.dtype or model.dtype, streaming.folder)
        super().__init__(
            model, family, ids, batch, states, device=streaming.resolved_device(model), dtype=streaming.dtype,
            progress=progress, total=2 * count * len(ids), fixed=collector.coupled,
        )  # fmt: skip
        self.collector = collector
        self.gradient = self.states[self.count + 1]

    def forward(self, index: int) -> None:
        """Outputs of one block for all sequences; its weights are read, and checked, here."""
        layer = self.layers[index]

        @torch.no_grad()
        def step(rows: slice) -> None:
            out = self.finite(self.block(index, self.states[index][rows].to(self.device)), index, rows)
            self.states[index + 1][rows] = out.to(CPU)

        with self.here(tensors_of(layer)):
            refuse_nonfinite_layer(layer, self.family, index)
            self.collector.measure_weights(index)
            self.micro_batches(step, counted=True)

    def head(self) -> None:
        """Loss of every sequence, and its gradient with respect to the last block's output."""

        def step(rows: slice) -> None:
            hidden = self.states[self.count][rows].to(self.device, copy=True).requires_grad_()
            identity: list[Callable[..., Tensor]] = [lambda hidden_states, *_, **__: hidden_states] * (self.count - 1)
            with self.replaced([*identity, lambda *_, **__: hidden]):
                losses = backward_sequence_losses(
                    self.model, self.ids[rows].to(self.device), None, 1.0 / self.collector.scale
                )
            if not torch.isfinite(losses).all():
                raise ValueError(
                    f"expected a finite loss, got {losses.tolist()}; first NaN or inf in the output of "
                    "the final norm or the output head"
                )
            assert hidden.grad is not None  # backward has just run
            self.gradient[rows] = hidden.grad.to(CPU)

        with self.here(outside(self.model, self.family)):
            self.micro_batches(step)
        self.states.drop(self.count)

    def backward(self, index: int) -> None:
        """Statistics of one block; its output's gradients become its input's."""

        def step(rows: slice) -> None:
            self.collector.begin(sequence_spans(torch.ones_like(self.ids[rows])), index)
            hidden = self.states[index][rows].to(self.device, copy=True).requires_grad_()
            with torch.enable_grad():
                out = self.block(index, hidden)
            out.backward(self.gradient[rows].to(self.device))
            self.collector.finish()
            assert hidden.grad is not None  # backward has just run
            self.gradient[rows] = hidden.grad.to(CPU)

        with self.here(tensors_of(self.layers[index])):
            self.micro_batches(step, counted=True)
        self.states.drop(index)


def streamed_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """The most bytes of weights in ``dtype`` that are on the device at a time: a block's, or all that is in none."""
    family = family_of(model)
    parts = [outside(model, family), *map(tensors_of, layers_of(model, family))]
    return max(sum(tensor.numel() for tensor in part) for part in parts) * dtype.itemsize
