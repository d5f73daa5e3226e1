"""A walk through the blocks without gradients, in micro-batches that fit a device, which sees what o and down get."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saap.blocks import Blocks
from saap.experts import Routing, patch_experts
from saap.families import family_of, linears_of
from saap.hidden_states import HiddenStates
from saap.micro_batches import Progress, fit_micro_batches
from saap.stream import Streaming, streamed_bytes
from saap.undo import Undo
from saap.units import IN_PARTS, Units


class ForwardBlocks(Blocks):
    """The blocks of a model as functions of hidden states of ids (N, T), of which ``states`` tensors are kept.

    ``taken`` are the bytes on the device that a block takes beside its weights and activations; ``passes`` says how
    often a sequence goes through each block, for the progress.
    """

    def __init__(
        self, model: PreTrainedModel, units: Units, ids: Tensor, streaming: Streaming | None, *, taken: int,
        batch_size: int | str, progress: Progress | None, states: int = 1, passes: int = 1,
    ) -> None:  # fmt: skip
        given = streaming or Streaming(device=model.device)
        device, dtype = given.resolved_device(model), given.dtype or model.dtype
        fit = fit_micro_batches(
            units, len(ids), ids.shape[1], dtype, device, batch_size=batch_size,
            streamed_bytes=taken + (0 if streaming is None else streamed_bytes(model, dtype)),
        )  # fmt: skip
        super().__init__(
            model, family_of(model, units.family), ids, fit.batch,
            HiddenStates(states, (*ids.shape, units.layers[0].hidden_size), dtype, given.folder),
            device=device, dtype=given.dtype, progress=progress, total=passes * len(units.layers) * len(ids),
        )  # fmt: skip
        self.precision = torch.float64 if dtype == torch.float64 else torch.float32

    @contextmanager
    def walking(self) -> Iterator[None]:
        """Eval mode without gradients; the hidden states are freed at the end and the model is left as found."""
        undo = Undo()
        undo.eval_mode(self.model)
        try:
            with torch.no_grad():
                yield
        finally:
            undo.restore()
            self.states.close()

    @contextmanager
    def watched(self, index: int) -> Iterator[dict[str, Any]]:
        """{part: (inputs, outputs)} of the latest forward of o and down while the context is open.

        Of experts the inputs of down are one tensor per expert, and there are no outputs.
        """
        seen: dict[str, Any] = {}
        undo = Undo()

        def watch_experts(rows: Tensor, routing: Routing) -> Tensor:
            seen["down"] = rows.split(routing.counts), None
            return rows

        def watch(part: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[part] = args[0], output

        try:
            for part, linear in linears_of(self.layers[index], self.family).items():
                if part in IN_PARTS:
                    undo.add(linear.register_forward_hook(partial(watch, part)).remove)
            if self.family.experts is not None:
                undo.add(patch_experts(self.layers[index], self.family, watch_experts))
            yield seen
        finally:
            undo.restore()
