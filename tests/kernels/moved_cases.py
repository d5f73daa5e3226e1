"""Quantised weights and low-rank changes of them, for the tests of all backends."""

import torch

from saap_kernels import PackedWeight, pack
from saap_kernels.moved_levels import Change

SHAPES = [(1, 1), (70, 99), (130, 515), (17, 64)]  # tail groups and blocks, rows beyond one team of 16 and one panel


def case(shape, bits: int, group: int, dtype: torch.dtype, rank: int = 5) -> tuple[PackedWeight, Change]:
    torch.manual_seed(0)
    weight = 0.1 * torch.randn(shape, dtype=dtype)
    weight[0, :group] = 0.25  # a group of one value, without steps
    # of a few levels at 4 bits and dozens at 8, so that some are clamped
    return pack(weight, bits=bits, group_size=group), Change(
        0.1 * torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    )
