"""``saap.collect``: importance statistics from any loop that runs forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import saap_kernels
from saap.collector import Collector
from saap.loss import sequence_spans
from saap.record import BatchRecord
from saap.units import discover


@contextmanager
def collect(
    model: PreTrainedModel,
    spans: Tensor | None = None,
    loss_scale: float = 1.0,
    *,
    checkpoint_layers: bool = False,
    backend: str | None = None,
    coupled: bool = False,
) -> Iterator[Collector]:
    """Collect importance statistics from anybody's loop; yields an object whose ``statistics`` fill up.

        with saap.collect(model, loss_scale=1 / len(ids)) as collected:
            model(input_ids=ids, labels=ids).loss.backward()
        collected.statistics.save("model.stats.safetensors")

    Every forward pass with gradients enabled counts once its backward pass has run. ``spans`` (S, 2) int32
    gives the sequences of each forward as half-open row ranges of the flattened (batch, tokens); None takes
    one sequence per row of the batch, from ``attention_mask`` where there is padding. The method's objective
    is the SUM over sequences of each one's mean loss: ``loss_scale`` is what your loss has in its place, for
    instance 1 / batch size for a mean over equally long rows. Under torch.autocast the statistics are those of
    the rounded weights that the products took.

    Additive over any number of backward passes, one per forward; with ``coupled``, LLM-Pruner's coupled
    salience (the absolute value after the mean over sequences) too, for one pass only. Training mode,
    requires_grad and ``.grad`` are left as found, also after an exception. Raises ValueError for models that
    ``discover`` refuses and, naming layer and sequence, for gradients that are not finite; RuntimeError for a
    backward pass that stopped half-way or ran twice, or when none ran at all.
    """
    collector = Collector(
        model,
        discover(model),
        checkpoint_layers=checkpoint_layers,
        backend=backend,
        loss_scale=loss_scale,
        coupled=coupled,
    )
    pending: list[BatchRecord] = []

    def before_forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for batch in [batch for batch in pending if batch.complete]:
            collector.fold(batch)
            pending.remove(batch)
        if torch.is_grad_enabled():
            collector.begin(_spans_of_forward(spans, args, kwargs))
            assert collector.batch is not None  # just begun
            pending.append(collector.batch)

    with collector:
        decoder = model.get_submodule(collector.family.layers.rpartition(".")[0])  # some heads call it directly
        handle = decoder.register_forward_pre_hook(before_forward, with_kwargs=True)
        try:
            yield collector
        finally:
            handle.remove()
        for batch in pending:
            if batch.started:
                collector.fold(batch)
        if not collector.statistics.sequences:
            raise RuntimeError("expected a backward pass inside collect, none reached the model's layers")


def _spans_of_forward(spans: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The caller's spans checked against the batch, or one per row of the batch."""
    ids = args[0] if args else kwargs.get("input_ids")
    shape = kwargs["inputs_embeds"].shape if ids is None else ids.shape
    if spans is None:
        mask = kwargs.get("attention_mask")
        return sequence_spans(torch.ones(shape[:2]) if mask is None else mask)
    saap_kernels.check_spans(spans, shape[0] * shape[1])
    return spans
