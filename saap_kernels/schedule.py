"""Spans cut into token blocks: the one loop that a kernel runs over all sequences."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

CACHED_SCHEDULES = 64  # calibration uses the same spans for every layer; a device copy each is small

END = (0, 0, -1, 0, 0)  # kernels read one block ahead

Spans = tuple[tuple[int, int], ...]


def as_spans(spans: Tensor) -> Spans:
    """The (S, 2) CPU tensor as a hashable tuple of (start, stop)."""
    return tuple((start, stop) for start, stop in spans.tolist())


_in_graphs: dict[int, Tensor] = {}  # tables that captured graphs read at every replay, by address


def _cached(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache the tables that ``build`` makes, each safe on any stream and in graphs.

    Another stream than the one a table was made on may still read it when the cache drops it, and a graph may
    read it long after: the allocator is told of the first, and tables of the second kind are never freed.
    """
    cached = lru_cache(maxsize=CACHED_SCHEDULES)(build)

    @wraps(build)
    def table(*arguments: Any) -> Tensor:
        found = cached(*arguments)
        if found.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                _in_graphs[found.data_ptr()] = found
            else:
                found.record_stream(torch.cuda.current_stream(found.device))
        return found

    return table


def _on_device(table: list[Any], device: torch.device) -> Tensor:
    """The table as int32 there; raises RuntimeError while a CUDA graph is captured, which has no room for the copy."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "these spans are new, and their table cannot be copied to the device while a CUDA graph is captured: "
            "run the op once with the same spans before the capture"
        )
    return torch.tensor(table, dtype=torch.int32).to(device)


@_cached
def masked_blocks(spans: Spans, block: int, device: torch.device) -> Tensor:
    """(B + 1, 5) int32: first row, rows, sequence at its last block (else -1), 0, 0; the last block may be short."""
    table = []
    for sequence, (start, stop) in enumerate(spans):
        for row in range(start, stop, block):
            last = row + block >= stop
            table.append((row, min(block, stop - row), sequence if last else -1, 0, 0))
    return _on_device([*table, END], device)


@_cached
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
    return _on_device([*table, END], device)


@_cached
def first_blocks(spans: Spans, block: int, device: torch.device) -> Tensor:
    """(S + 1,) int32: index of each sequence's first row in ``masked_blocks``, and their number."""
    starts = [0]
    for start, stop in spans:
        starts.append(starts[-1] + -(-(stop - start) // block))
    return _on_device(starts, device)
