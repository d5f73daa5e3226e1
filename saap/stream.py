"""Block streaming: calibrate a model larger than the device, one decoder block on it at a time.

The loops over sequences and blocks change places. Forward, each block is brought in once and reads all
sequences; its inputs stay on the host or on disk. Backward, each block is brought in once more, runs
forward again from its saved input and backward from the gradient of its output. Per block the operations
and their order are those of activation checkpointing, so the statistics are the same.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saap.collector import Collector
from saap.families import family_of, layers_of
from saap.hidden_states import CPU, HiddenStates
from saap.loss import backward_sequence_losses, sequence_spans
from saap.memory import available_bytes, weight_bytes
from saap.micro_batches import Progress, in_micro_batches
from saap.refuse import refuse_nonfinite_embeddings, refuse_nonfinite_layer
from saap.undo import Undo

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block gets besides its hidden states


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


class _Run:
    """One pass of all sequences; methods in the order they are called."""

    def __init__(
        self, collector: Collector, ids: Tensor, batch: int, streaming: Streaming, progress: Progress | None
    ) -> None:
        self.collector, self.model = collector, collector.model
        self.layers = layers_of(self.model, collector.family)
        self.count, self.batch = len(self.layers), batch
        self.device, self.dtype = streaming.resolved_device(self.model), streaming.dtype
        self.ids, self.progress, self.done = ids, progress, 0
        self.calls: dict[int, list[Call]] = {}  # by batch size: positions and mask depend on the shape alone
        width = collector.statistics.units.layers[0].hidden_size
        shape, dtype = (*ids.shape, width), self.dtype or self.model.dtype
        # inputs of the blocks, output of the last one, gradient of the output of the block that runs backward
        self.states = HiddenStates(self.count + 2, shape, dtype, streaming.folder)
        self.gradient = self.states[self.count + 1]

    def embed(self) -> None:
        """Inputs of the first block, and what every block gets besides."""
        refuse_nonfinite_embeddings(self.model)
        with self._here(_outside(self.model)):
            self._micro_batches(lambda rows: self.states[0][rows].copy_(self._embed(self.ids[rows])))

    def _embed(self, ids: Tensor) -> Tensor:
        return self._enter(len(ids), input_ids=ids.to(self.device))

    @torch.no_grad()
    def _enter(self, size: int, **inputs: Tensor) -> Tensor:
        """Input of the first block; keeps what every block gets besides."""
        seen: list[Tensor] = []
        calls: list[Call] = []

        def catch(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(hidden_states)
            calls.append((args, kwargs))
            return hidden_states

        with self._replaced([catch] * self.count):
            self.model.base_model(**inputs, use_cache=False)
        self.calls.setdefault(size, calls)
        return seen[0].detach()

    def _calls(self, index: int, size: int) -> Call:
        if size not in self.calls:  # after running out of memory: without the embeddings and the head beside a block
            rows = self.model.get_input_embeddings().weight
            shape, dtype = (size, self.ids.shape[1], rows.shape[1]), self.dtype or rows.dtype
            with self._here(_outside(self.model, embeddings=False)):
                self._enter(size, inputs_embeds=torch.zeros(shape, dtype=dtype, device=self.device))
        return self.calls[size][index]

    def forward(self, index: int) -> None:
        """Outputs of one block for all sequences; its weights are read, and checked, here."""
        layer = self.layers[index]

        @torch.no_grad()
        def step(rows: slice) -> None:
            out = self._block(index, self.states[index][rows].to(self.device))
            if not torch.isfinite(out).all():
                raise ValueError(
                    f"expected finite hidden states, found NaN or inf in the output of layer {index} "
                    f"for sequences {rows.start} to {rows.stop - 1}"
                )
            self.states[index + 1][rows] = out.to(CPU)

        with self._here(_tensors(layer)):
            refuse_nonfinite_layer(layer, self.collector.family, index)
            self.collector.measure_weights(index)
            self._micro_batches(step, counted=True)

    def _block(self, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._calls(index, len(hidden))
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def head(self) -> None:
        """Loss of every sequence, and its gradient with respect to the last block's output."""

        def step(rows: slice) -> None:
            hidden = self.states[self.count][rows].to(self.device, copy=True).requires_grad_()
            identity: list[Callable[..., Tensor]] = [lambda hidden_states, *_, **__: hidden_states] * (self.count - 1)
            with self._replaced([*identity, lambda *_, **__: hidden]):
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

        with self._here(_outside(self.model)):
            self._micro_batches(step)
        self.states.drop(self.count)

    def backward(self, index: int) -> None:
        """Statistics of one block; its output's gradients become its input's."""

        def step(rows: slice) -> None:
            self.collector.begin(sequence_spans(torch.ones_like(self.ids[rows])), index)
            hidden = self.states[index][rows].to(self.device, copy=True).requires_grad_()
            with torch.enable_grad():
                out = self._block(index, hidden)
            out.backward(self.gradient[rows].to(self.device))
            self.collector.finish()
            assert hidden.grad is not None  # backward has just run
            self.gradient[rows] = hidden.grad.to(CPU)

        with self._here(_tensors(self.layers[index])):
            self._micro_batches(step, counted=True)
        self.states.drop(index)

    def _micro_batches(self, step: Callable[[slice], object], counted: bool = False) -> None:
        def one(rows: slice) -> None:
            step(rows)
            if counted and self.progress is not None:
                self.done += rows.stop - rows.start
                self.progress(self.done, 2 * self.count * len(self.ids))

        self.batch = in_micro_batches(len(self.ids), self.batch, one, fixed=self.collector.coupled)

    @contextmanager
    def _here(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """``tensors`` on the device, in the dtype, while the context is open."""
        undo = Undo()
        try:
            for tensor in tensors:
                dtype = self.dtype if isinstance(tensor, nn.Parameter) else None  # buffers keep their own
                host = tensor.data
                moved = host.to(self.device, dtype)
                if moved is not host:
                    undo.add(partial(setattr, tensor, "data", host))
                    tensor.data = moved
            yield
        finally:
            undo.restore()

    @contextmanager
    def _replaced(self, forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
        """The blocks' forwards replaced, one by one, while the context is open."""
        undo = Undo()
        try:
            for layer, forward in zip(self.layers, forwards, strict=True):
                undo.patch_forward(layer, forward)
            yield
        finally:
            undo.restore()


def streamed_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """The most bytes of weights in ``dtype`` that are on the device at a time: a block's, or all that is in none."""
    parts = [_outside(model), *map(_tensors, layers_of(model, family_of(model)))]
    return max(sum(tensor.numel() for tensor in part) for part in parts) * dtype.itemsize


def _outside(model: PreTrainedModel, embeddings: bool = True) -> list[Tensor]:
    """Everything of the model that is not in a block; input embeddings and head only with ``embeddings``."""
    prefix = f"{family_of(model).layers}."
    large = [] if embeddings else [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in named if not name.startswith(prefix) and all(tensor is not t for t in large)]


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]
