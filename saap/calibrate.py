"""Calibration: one forward and one backward pass over sample text, giving Statistics."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap import distributed
from saap.collector import Collector
from saap.data import data_fingerprint, pack_for
from saap.determinism import deterministic_kernels
from saap.families import family_of, layers_of
from saap.loss import backward_sequence_losses, sequence_spans
from saap.micro_batches import Progress, fit_micro_batches, in_micro_batches
from saap.plan import to_ranges
from saap.refuse import refuse_nonfinite_weights
from saap.statistics import Statistics
from saap.stream import Streaming, resolve_streaming, stream_collect, streamed_bytes
from saap.units import discover

FP16_LOSS_SCALE = 1024.0  # keeps gradients of fp16 models out of the subnormal range


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    *,
    samples: int = 128,
    seq_len: int = 512,
    batch_size: int | str = "auto",
    checkpoint: bool | str = "auto",
    backend: str | None = None,
    seed: int = 0,
    coupled: bool = False,
    stream: bool | str | Streaming = "auto",
    progress: Progress | None = None,
) -> Statistics:
    """Measure the importance statistics of every unit of ``model`` (method section 2a).

    ``data`` is a path (.txt, .jsonl), ``hub:name[:config]``, or an iterable of str, dict or int
    tensors; it is packed into ``samples`` sequences of ``seq_len`` tokens. ``batch_size`` is in
    sequences ("auto": all that a GPU has room for) and is halved, with a warning, when a device runs out of
    memory. Inside a torch.distributed process group every rank takes its share of the sequences and all
    return the same merged statistics. ``checkpoint`` recomputes each block's activations in the backward
    pass: True (least memory), False (fastest), or "auto" (when they would not fit). ``coupled`` also
    measures LLM-Pruner's coupled salience, for which all samples form one micro-batch of one process.

    ``stream`` brings one decoder block at a time onto the device, once forward and once backward: True,
    False, a ``Streaming`` (device, dtype, folder), or "auto" for a model in host memory or mapped files that
    would not fit. The statistics are those of ``checkpoint``. ``progress(done, total)`` counts this process's
    sequences; when streaming, its sequences times blocks, forward and backward.

    No weight gets a gradient; weights, training mode and requires_grad are left as found. Raises
    ValueError, before the first forward pass, for models or data that cannot be used, and naming
    the layer when weights, loss or gradients are not finite (when streaming, weights are read, and
    refused, block by block during the forward pass).
    """
    units = discover(model)
    check_sizes(model, samples, seq_len, batch_size)
    if coupled:
        check_coupled(samples, batch_size)
    if checkpoint not in (True, False, "auto"):
        raise ValueError(f'checkpoint must be True, False or "auto"; got {checkpoint!r}')
    streaming = resolve_streaming(model, stream)
    if streaming is None:
        refuse_nonfinite_weights(model, family_of(model))
    ids = pack_for(model, tokenizer, data, samples=samples, seq_len=seq_len, seed=seed)
    mine = distributed.share(ids)
    device = model.device if streaming is None else streaming.resolved_device(model)
    dtype = (streaming and streaming.dtype) or model.dtype
    fit = fit_micro_batches(
        units, len(mine), seq_len, dtype, device,
        batch_size=batch_size, checkpoint=checkpoint, one_pass=coupled,
        streamed_bytes=None if streaming is None else streamed_bytes(model, dtype),
    )  # fmt: skip
    scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
    options: dict[str, Any] = {"backend": backend, "loss_scale": scale, "coupled": coupled}
    options |= {"checkpoint_layers": fit.recompute} if streaming is None else {"read_weights": False}
    with deterministic_kernels(device), Collector(model, units, **options) as collector:
        if streaming is None:
            _collect_all(collector, mine, fit.batch, progress)
        else:
            stream_collect(collector, mine, fit.batch, streaming, progress)
    statistics = collector.statistics
    distributed.all_reduce(statistics)
    warn_of_unrouted(statistics)
    statistics.data = (data_fingerprint(ids),)
    statistics.settings = {
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return statistics


def warn_of_unrouted(statistics: Statistics) -> None:
    """Say which experts no calibration token was routed to: nothing is known of them, and they are dropped first."""
    found = statistics.unrouted()
    if found and distributed.rank() == 0:
        named = "; ".join(f"layer {index}: {to_ranges(experts)}" for index, experts in found.items())
        warnings.warn(f"no calibration token was routed to these experts, which score 0: {named}", stacklevel=3)


def _collect_all(collector: Collector, ids: Tensor, batch: int, progress: Progress | None) -> None:
    def step(rows: slice) -> None:
        collect_batch(collector, ids[rows])
        if progress is not None:
            progress(rows.stop, len(ids))

    in_micro_batches(len(ids), batch, step, fixed=collector.coupled)


def collect_batch(collector: Collector, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Run one micro-batch through an open collector; input_ids (B, T) -> losses (B,).

    Padding (``attention_mask`` 0) is excluded everywhere. Raises ValueError naming the first layer
    whose output is not finite when the loss is not.
    """
    model = collector.model
    input_ids = input_ids.to(model.get_input_embeddings().weight.device)
    if attention_mask is not None:
        attention_mask = attention_mask.to(input_ids.device)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    collector.begin(sequence_spans(real))
    losses = backward_sequence_losses(model, input_ids, attention_mask, 1.0 / collector.scale)
    if not torch.isfinite(losses).all():
        where = _first_nonfinite_layer(collector, input_ids, attention_mask)
        raise ValueError(f"expected a finite loss, got {losses.tolist()}; first NaN or inf in the output of {where}")
    collector.finish()
    return losses


def check_sizes(model: PreTrainedModel, samples: int, seq_len: int, batch_size: int | str) -> None:
    """Raise ValueError for sequences that ``model`` or this process group cannot take."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    distributed.check_world(samples)
    longest = getattr(model.config, "max_position_embeddings", None) or seq_len
    if not 2 <= seq_len <= longest:
        raise ValueError(f"seq_len must lie between 2 and the model's {longest} positions; got {seq_len}")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'batch_size must be "auto" or a positive integer; got {batch_size!r}')


def check_coupled(samples: int, batch_size: int | str) -> None:
    """Raise ValueError unless one process takes all ``samples`` in one micro-batch, as coupled statistics need."""
    if distributed.world_size() > 1 or batch_size not in ("auto", samples):
        raise ValueError(
            f"coupled statistics need all {samples} samples in one micro-batch of one process; got batch_size "
            f"{batch_size} and {distributed.world_size()} processes. Leave --batch-size at auto and start one process; "
            "fewer --samples take less memory"
        )


@torch.no_grad()
def _first_nonfinite_layer(collector: Collector, input_ids: Tensor, attention_mask: Tensor | None) -> str:
    """Repeat the forward pass and name the first decoder layer whose output holds NaN or inf."""
    found: list[str] = []
    model, family = collector.model, collector.family

    def watch(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not found and not torch.isfinite(hidden).all():
                found.append(name)

        return hook

    named = [("the input embeddings", model.get_input_embeddings())]
    named += [(f"layer {index}", layer) for index, layer in enumerate(layers_of(model, family))]
    handles = [module.register_forward_hook(watch(name)) for name, module in named]
    try:
        model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the final norm or the output head"
