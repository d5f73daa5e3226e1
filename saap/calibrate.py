"""Calibration: one forward and one backward pass over sample text, giving Statistics."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap import distributed
from saap.collector import Collector
from saap.data import check_tokenizer, data_fingerprint, pack
from saap.families import family_of, layers_of
from saap.loss import backward_sequence_losses, sequence_spans
from saap.memory import activation_bytes, available_bytes
from saap.refuse import refuse_nonfinite_weights
from saap.statistics import Statistics
from saap.units import discover

Progress = Callable[[int, int], None]
# a micro-batch's activations should be small beside the weights on a CPU, and fill the device on a GPU
AUTO_BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
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
    progress: Progress | None = None,
) -> Statistics:
    """Measure the importance statistics of every unit of ``model`` (method section 2a).

    ``data`` is a path (.txt, .jsonl), ``hub:name[:config]``, or an iterable of str, dict or int
    tensors; it is packed into ``samples`` sequences of ``seq_len`` tokens. ``batch_size`` is in
    sequences and is halved, with a warning, when a device runs out of memory. Inside a
    torch.distributed process group every rank takes its share of the sequences and all return the
    same merged statistics. ``checkpoint`` recomputes each block's activations in the backward pass:
    True, False, or "auto" (when they would not fit). ``coupled`` also measures LLM-Pruner's coupled
    salience, for which all samples form one micro-batch. ``progress(done, total)`` counts this process's
    sequences.

    No weight gets a gradient; weights, training mode and requires_grad are left as found. Raises
    ValueError, before the first forward pass, for models or data that cannot be used, and naming
    the layer when weights, loss or gradients are not finite.
    """
    units = discover(model)
    _check_sizes(model, samples, seq_len, batch_size, checkpoint, coupled)
    refuse_nonfinite_weights(model, family_of(model))
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    ids = pack(tokenizer, data, samples=samples, seq_len=seq_len, seed=seed)
    if int(ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"expected token ids below the vocabulary size {model.config.vocab_size}, got {int(ids.max())}"
        )
    mine = distributed.share(ids)
    batch = samples if coupled else resolve_batch(batch_size, seq_len, model.device)
    if checkpoint == "auto":
        checkpoint = activation_bytes(units, batch * seq_len, model.dtype) > 0.5 * available_bytes(model.device)
    scale = FP16_LOSS_SCALE if model.dtype == torch.float16 else 1.0
    options = {"checkpoint_layers": bool(checkpoint), "backend": backend, "loss_scale": scale, "coupled": coupled}
    with Collector(model, units, **options) as collector:  # type: ignore[arg-type]  # a dict of mixed values
        _collect_all(collector, mine, batch, progress)
    statistics = collector.statistics
    distributed.all_reduce(statistics)
    statistics.data = (data_fingerprint(ids),)
    statistics.settings = {
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return statistics


def _collect_all(collector: Collector, ids: Tensor, batch: int, progress: Progress | None) -> None:
    """Every sequence once, in micro-batches that are halved, with a warning, when the device runs out of memory."""
    done = 0
    while done < len(ids):
        try:
            collect_batch(collector, ids[done : done + batch])
        except torch.OutOfMemoryError:
            if batch == 1 or collector.coupled:
                raise
            batch //= 2
            warnings.warn(f"out of device memory: going on with micro-batches of {batch} sequences", stacklevel=3)
            torch.cuda.empty_cache()
            continue
        done = min(done + batch, len(ids))
        if progress is not None:
            progress(done, len(ids))


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


def resolve_batch(batch_size: int | str, seq_len: int, device: torch.device) -> int:
    """Sequences per micro-batch: the given number, or "auto" for the device."""
    if batch_size != "auto":
        return int(batch_size)
    return max(1, AUTO_BATCH_TOKENS.get(device.type, 512) // seq_len)


def _check_sizes(
    model: PreTrainedModel, samples: int, seq_len: int, batch_size: int | str, checkpoint: bool | str, coupled: bool
) -> None:
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    distributed.check_world(samples)
    longest = getattr(model.config, "max_position_embeddings", None) or seq_len
    if not 2 <= seq_len <= longest:
        raise ValueError(f"seq_len must lie between 2 and the model's {longest} positions; got {seq_len}")
    if coupled and (distributed.world_size() > 1 or batch_size not in ("auto", samples)):
        raise ValueError(
            f"coupled statistics need all {samples} samples in one micro-batch of one process; "
            f"got batch_size {batch_size} and {distributed.world_size()} processes"
        )
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'batch_size must be "auto" or a positive integer; got {batch_size!r}')
    if checkpoint not in (True, False, "auto"):
        raise ValueError(f'checkpoint must be True, False or "auto"; got {checkpoint!r}')


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
