"""Sequences in micro-batches that shrink when a device runs out of memory."""

import warnings
from collections.abc import Callable

import torch

Progress = Callable[[int, int], None]  # of work done and its total
AUTO_BATCH_TOKENS = {"cpu": 512, "cuda": 8192}  # small beside the weights on a CPU; fills a GPU


def resolve_batch(batch_size: int | str, seq_len: int, device: torch.device) -> int:
    """Sequences per micro-batch: the given number, or "auto" for the device."""
    if batch_size != "auto":
        return int(batch_size)
    return max(1, AUTO_BATCH_TOKENS.get(device.type, 512) // seq_len)


def in_micro_batches(total: int, batch: int, step: Callable[[slice], object], *, fixed: bool = False) -> int:
    """Call ``step`` for slices of ``batch`` of ``total`` sequences; returns the size that was reached.

    A step that runs out of device memory is repeated with half as many sequences, with a warning, unless
    ``fixed`` or at one sequence: then torch.OutOfMemoryError goes through.
    """
    done = 0
    while done < total:
        try:
            step(slice(done, min(done + batch, total)))
        except torch.OutOfMemoryError:
            if batch == 1 or fixed:
                raise
            batch //= 2
            warnings.warn(f"out of device memory: going on with micro-batches of {batch} sequences", stacklevel=3)
            torch.cuda.empty_cache()
            continue
        done += batch
    return batch
