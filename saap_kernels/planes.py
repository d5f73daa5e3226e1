"""What the GPU kernels of the activation ops share: which planes are summed, in which token blocks, into what."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saap_kernels.schedule import as_spans, first_blocks, masked_blocks

PLANES = ("salience", "sum", "square", "absmax", "abs")


@dataclass(frozen=True)
class Planes:
    """``partial`` (planes, blocks, K) holds the sums of token blocks, ``result`` (planes, S, K) those of sequences.

    Where every sequence is one block nothing is left to add: ``result`` is ``partial``.
    """

    slots: list[int]  # plane of each of PLANES, or -1
    blocks: Tensor
    starts: Tensor  # (S + 1,) first block of each sequence
    count: int  # of blocks
    partial: Tensor
    result: Tensor

    @classmethod
    def of(cls, x: Tensor, dx: Tensor | None, spans: Tensor, want: Sequence[str]) -> "Planes":
        """Planes: the salience x * dx if ``dx`` is given, then ``want``."""
        device, ranges = x.device, as_spans(spans)
        names = ([] if dx is None else ["salience"]) + list(want)
        rows = rows_per_partial(ranges[-1][1] - ranges[0][0])
        blocks = masked_blocks(ranges, rows, device)
        count = len(blocks) - 1
        partial = torch.empty(len(names), count, x.shape[1], dtype=torch.float32, device=device)
        result = partial if count == len(ranges) else partial.new_empty(len(names), len(ranges), x.shape[1])
        slots = [names.index(name) if name in names else -1 for name in PLANES]
        return cls(slots, blocks, first_blocks(ranges, rows, device), count, partial, result)


def rows_per_partial(tokens: int) -> int:
    """Tokens that one program sums: many programs for short calls, few partial sums for long ones."""
    return 64 if tokens <= 4096 else 256
