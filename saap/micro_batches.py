"""Sequences in micro-batches: fitted to a device, and made smaller when it runs out of memory all the same."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from saap.memory import activation_bytes, available_bytes, block_activation_bytes, checkpointed_bytes
from saap.units import Units

Progress = Callable[[int, int], None]  # of work done and its total
CPU_BATCH_TOKENS = 512  # small beside the weights; larger micro-batches are no faster there
ENOUGH_BATCH_TOKENS = 4096  # occupy a GPU; below them recomputing blocks to fit more tokens pays
FILL = 0.6  # of a GPU's free memory; the rest is for workspaces, logits and what the estimate misses

ONE_PASS_HELP = (
    "fewer samples (--samples), shorter ones (--seq-len), checkpointing (--checkpoint on) or streaming (--stream on) "
    "take less; a smaller --batch-size is no way out"
)


class Fit(NamedTuple):
    """Sequences per micro-batch, whether blocks are recomputed in the backward pass, and what autograd then keeps."""

    batch: int
    recompute: bool
    activation_bytes: int


def fit_micro_batches(
    units: Units,
    samples: int,
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch_size: int | str = "auto",
    checkpoint: bool | str = "auto",
    streamed_bytes: int | None = None,
    one_pass: bool = False,
) -> Fit:
    """How ``samples`` sequences of ``seq_len`` tokens are cut for a device, by estimates of ``saap.memory``.

    Given values stay. "auto" is ``CPU_BATCH_TOKENS`` tokens on a CPU, and as many as fit in a GPU: without
    recomputation if all sequences, or ``ENOUGH_BATCH_TOKENS`` tokens, fit so; a power of two unless all fit, so
    that a little more or less free memory changes no rounding. ``streamed_bytes``, when blocks are streamed, is
    what their weights will take; then only one block's activations are on the device. With ``one_pass`` all are one
    micro-batch: ValueError where its activations, recomputed if ``checkpoint`` lets them be, find no room.
    """
    if one_pass:
        batch_size = samples
    on_gpu, automatic = device.type == "cuda", batch_size == "auto"
    room = (FILL if on_gpu else 0.5) * (available_bytes(device) - (streamed_bytes or 0))

    def kept(batch: int, recompute: bool) -> int:
        if streamed_bytes is not None:
            return block_activation_bytes(units, batch * seq_len, dtype)
        return (checkpointed_bytes if recompute else activation_bytes)(units, batch * seq_len, dtype)

    def largest(recompute: bool) -> int:
        if not on_gpu:
            return max(1, CPU_BATCH_TOKENS // seq_len)
        if kept(samples, recompute) <= room:
            return samples
        batch = 1
        while kept(2 * batch, recompute) <= room:
            batch *= 2
        return batch

    recompute = checkpoint is True
    batch = largest(recompute) if automatic else int(batch_size)
    if checkpoint == "auto" and streamed_bytes is None:
        too_few = on_gpu and automatic and batch < samples and batch * seq_len < ENOUGH_BATCH_TOKENS
        recompute = too_few or kept(batch, recompute=False) > room
        if recompute and automatic:
            batch = largest(recompute)
    if one_pass:
        check_one_pass(kept(batch, recompute), available_bytes(device) - (streamed_bytes or 0), samples, seq_len)
    return Fit(batch, recompute, kept(batch, recompute))


def check_one_pass(wanted: int, free: int, samples: int, seq_len: int) -> None:
    """Raise ValueError unless the ``wanted`` bytes that one backward pass of all samples keeps are ``free``."""
    if wanted > free:
        raise ValueError(
            f"coupled statistics take all {samples} samples of {seq_len} tokens in one backward pass: about "
            f"{wanted / 2**30:.1f} GiB of activations, {max(free, 0) / 2**30:.1f} GiB are free; {ONE_PASS_HELP}"
        )


def in_micro_batches(total: int, batch: int, step: Callable[[slice], object], *, fixed: bool = False) -> int:
    """Call ``step`` for slices of ``batch`` of ``total`` sequences; returns the size that was reached.

    A step that runs out of device memory is repeated with half as many sequences, with a warning, unless
    ``fixed`` or at one sequence: then torch.OutOfMemoryError goes through, for ``fixed`` saying what helps.
    """
    done = 0
    while done < total:
        try:
            step(slice(done, min(done + batch, total)))
        except torch.OutOfMemoryError as error:
            if fixed:
                said = f"out of memory: {total} sequences must go through one backward pass; {ONE_PASS_HELP} ({error})"
                raise torch.OutOfMemoryError(said) from error
            if batch == 1:
                raise
        else:
            done += batch
            continue
        # behind the handler: in it, the error's traceback still holds the failed step's activations
        batch //= 2
        warnings.warn(f"out of device memory: going on with micro-batches of {batch} sequences", stacklevel=3)
        torch.cuda.empty_cache()
    return batch
