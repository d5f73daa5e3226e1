"""Spans cut into token blocks: the one loop that a kernel runs over all sequences."""

from functools import lru_cache

import torch
from torch import Tensor

CACHED_SCHEDULES = 64  # calibration uses the same spans for every layer; a device copy each is small

END = (0, 0, -1, 0, 0)  # kernels read one block ahead

Spans = tuple[tuple[int, int], ...]


def as_spans(spans: Tensor) -> Spans:
    """The (S, 2) CPU tensor as a hashable tuple of (start, stop)."""
    return tuple((start, stop) for start, stop in spans.tolist())


@lru_cache(maxsize=CACHED_SCHEDULES)
def masked_blocks(spans: Spans, block: int, device: torch.device) -> Tensor:
    """(B + 1, 5) int32: first row, rows, sequence at its last block (else -1), 0, 0; the last block may be short."""
    table = []
    for sequence, (start, stop) in enumerate(spans):
        for row in range(start, stop, block):
            last = row + block >= stop
            table.append((row, min(block, stop - row), sequence if last else -1, 0, 0))
    return torch.tensor([*table, END], dtype=torch.int32).to(device)


@lru_cache(maxsize=CACHED_SCHEDULES)
def whole_blocks(spans: Spans, block: int, rows: int, device: torch.device) -> Tensor:
    """(B + 1, 5) int32: first row, block, sequence at its last block (else -1), first row and rows of its tail.

    Only whole blocks, so that they can be loaded without a mask. A sequence shorter than one block
    gets a block at row ``rows``, past the end, where tensor descriptors read zeros.
    """
    table = []
    for sequence, (start, stop) in enumerate(spans):
        whole = (stop - start) // block
        tail = start + whole * block
        starts = [start + index * block for index in range(whole)] or [rows]
        table += [(row, block, -1, 0, 0) for row in starts[:-1]]
        table.append((starts[-1], block, sequence, tail, stop - tail))
    return torch.tensor([*table, END], dtype=torch.int32).to(device)


@lru_cache(maxsize=CACHED_SCHEDULES)
def first_blocks(spans: Spans, block: int, device: torch.device) -> Tensor:
    """(S + 1,) int32: index of each sequence's first row in ``masked_blocks``, and their number."""
    starts = [0]
    for start, stop in spans:
        starts.append(starts[-1] + -(-(stop - start) // block))
    return torch.tensor(starts, dtype=torch.int32).to(device)
