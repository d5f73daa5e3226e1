"""All sequences through one decoder block after another, with one block's weights on the device at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saap.families import Family, layers_of
from saap.hidden_states import HiddenStates
from saap.micro_batches import Progress, in_micro_batches
from saap.refuse import refuse_nonfinite_embeddings
from saap.undo import Undo

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block gets besides its hidden states


class Blocks:
    """The decoder blocks of ``model`` as functions of the hidden states of ids (N, T), in micro-batches.

    ``device`` computes, in ``dtype`` (None: the weights' own); ``states`` holds what goes from block to block,
    the first block's inputs in its first tensor. ``progress(done, total)`` counts sequences of counted passes.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, ids: Tensor, batch: int, states: HiddenStates, *,
        device: torch.device, dtype: torch.dtype | None, progress: Progress | None, total: int, fixed: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.family, self.layers = model, family, layers_of(model, family)
        self.count, self.ids, self.batch, self.fixed = len(self.layers), ids, batch, fixed
        self.states, self.device, self.dtype = states, device, dtype
        self.progress, self.done, self.total = progress, 0, total
        self._calls: dict[int, list[Call]] = {}  # by batch size: positions and mask depend on the shape alone

    def embed(self) -> None:
        """Inputs of the first block, and what every block gets besides; refuses embeddings that are not finite."""
        refuse_nonfinite_embeddings(self.model)
        with self.here(outside(self.model, self.family)):
            self.micro_batches(lambda rows: self.states[0][rows].copy_(self._embed(self.ids[rows])))

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

        with self.replaced([catch] * self.count):
            self.model.base_model(**inputs, use_cache=False)
        self._calls.setdefault(size, calls)
        return seen[0].detach()

    def block(self, index: int, hidden: Tensor) -> Tensor:
        """Output of one block, which ``here`` has brought in; hidden (B, T, D) on the device."""
        args, kwargs = self._call(index, len(hidden))
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def finite(self, out: Tensor, index: int, rows: slice) -> Tensor:
        """A block's output as it is; raises ValueError naming the block and the sequences of one with NaN or inf."""
        if not torch.isfinite(out).all():
            raise ValueError(
                f"expected finite hidden states, found NaN or inf in the output of layer {index} "
                f"for sequences {rows.start} to {rows.stop - 1}"
            )
        return out

    def _call(self, index: int, size: int) -> Call:
        if size not in self._calls:  # after running out of memory: without the embeddings and the head beside a block
            rows = self.model.get_input_embeddings().weight
            shape, dtype = (size, self.ids.shape[1], rows.shape[1]), self.dtype or rows.dtype
            with self.here(outside(self.model, self.family, embeddings=False)):
                self._enter(size, inputs_embeds=torch.zeros(shape, dtype=dtype, device=self.device))
        return self._calls[size][index]

    def micro_batches(self, step: Callable[[slice], object], counted: bool = False) -> None:
        """Call ``step`` for the rows of every micro-batch; one that runs out of memory is repeated with fewer rows."""

        def one(rows: slice) -> None:
            step(rows)
            if counted and self.progress is not None:
                self.done += rows.stop - rows.start
                self.progress(self.done, self.total)

        self.batch = in_micro_batches(len(self.ids), self.batch, one, fixed=self.fixed)

    @contextmanager
    def here(self, tensors: Iterable[Tensor]) -> Iterator[None]:
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
    def replaced(self, forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
        """The blocks' forwards replaced, one by one, while the context is open."""
        undo = Undo()
        try:
            for layer, forward in zip(self.layers, forwards, strict=True):
                undo.patch_forward(layer, forward)
            yield
        finally:
            undo.restore()


def outside(model: PreTrainedModel, family: Family, embeddings: bool = True) -> list[Tensor]:
    """Everything of the model that is not in a block; input embeddings and head only with ``embeddings``."""
    prefix = f"{family.layers}."
    large = [] if embeddings else [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in named if not name.startswith(prefix) and all(tensor is not t for t in large)]


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """Parameters and buffers of one block."""
    return [*layer.parameters(), *layer.buffers()]
