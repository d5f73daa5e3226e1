"""Which tiles the Triton inference kernels run with, by class of shape, and what both are launched with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saap_kernels.packed import QUANTISED_LINE, PackedWeight, round_up

FEW_TOKENS = 16  # up to here a product is bound by reading the weight
SHORTEST_SPLIT = 4  # steps: as many as are read ahead
PROGRAMS = 2  # of one multiprocessor, below which K is split


@dataclass(frozen=True)
class Problem:
    """What a configuration depends on; ``rows`` is N or F, ``columns`` K."""

    tokens: int
    rows: int
    columns: int
    bits: int
    group: int  # 0 for bits 16
    dtype: torch.dtype  # of x
    gated: bool
    processors: int


@dataclass(frozen=True)
class LinearConfig:
    """A tile of rows by tokens, columns of one step, programs that share a tile's K, and how it is run."""

    block_t: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1


def choose_config(problem: Problem) -> LinearConfig:
    """A frozen tile by class of shape, so that pruned layers compile nothing new, and K split for few tiles."""
    few = problem.tokens <= FEW_TOKENS
    if problem.dtype == torch.float32:  # the correctness path
        config = LinearConfig(16, 64, 32, 4, 2)
    elif few:
        # 16 KiB of weight a step (8 for int4), three steps in flight
        block_n = 64 if problem.bits == 16 or problem.gated else 128
        config = LinearConfig(16, block_n, 128, 4, 4)
    elif problem.gated:
        config = LinearConfig(128, 64, 64, 4, 3)
    else:
        config = LinearConfig(128, 128, 64, 8, 4)
    block_k = step_columns(config.block_k, problem.bits, problem.group)
    splits = 1
    if few:
        tiles = -(-problem.rows // config.block_n)
        splits = split_count(tiles, -(-problem.columns // block_k), problem.processors)
    return LinearConfig(config.block_t, config.block_n, block_k, config.warps, config.stages, splits)


def step_columns(most: int, bits: int, group: int) -> int:
    """Columns of one step: they lie in one group, and int4 takes whole blocks of 64."""
    columns = most
    while bits != 16 and group % columns and columns > 32:
        columns //= 2
    return max(columns, 64) if bits == 4 else columns


def split_count(tiles: int, steps: int, processors: int) -> int:
    """Programs that share one tile's ``steps``: enough for two on each multiprocessor, none without a step.

    A multiprocessor keeps enough reads in flight from two programs; a program shorter than the steps that it reads
    ahead costs more than it brings.
    """
    wanted = -(-PROGRAMS * processors // tiles)
    splits = max(1, min(wanted, steps // SHORTEST_SPLIT))
    return -(-steps // -(-steps // splits))


@dataclass(frozen=True)
class Operands:
    """x, whose first ``columns`` are multiplied, the packed weight, and tensors in place of those it lacks."""

    x: Tensor
    weight: PackedWeight
    columns: int
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: PackedWeight, columns: int) -> "Operands":
        scale, zero = (x if each is None else each for each in (weight.scale, weight.zero))
        return cls(x, weight, columns, scale, zero)

    @property
    def group(self) -> int:
        """The group size; that of a group wider than the row is a row's, 0 means none."""
        return min(self.weight.group_size or 0, round_up(self.weight.columns, QUANTISED_LINE))

    def problem(self, *, gated: bool) -> Problem:
        processors = 1
        if self.x.is_cuda:
            processors = torch.cuda.get_device_properties(self.x.device).multi_processor_count
        weight = self.weight
        return Problem(len(self.x), weight.rows, self.columns, weight.bits, self.group, self.x.dtype, gated, processors)

    @property
    def x_unit(self) -> int:
        """What x's pitch is passed in multiples of: Triton sees that 8 of them are aligned."""
        return 1 if self.x.stride(0) % 8 else 8

    def sizes(self, config: LinearConfig) -> tuple[int, ...]:
        """K, x's pitch, rows and pitch of the data, groups, group, steps of one split."""
        data, steps = self.weight.data, -(-self.columns // config.block_k)
        groups = self.scale.shape[-1] if self.weight.scale is not None else 1
        return (
            self.columns, self.x.stride(0) // self.x_unit, data.shape[-2], data.shape[-1], groups,
            max(self.group, 1), -(-steps // config.splits),
        )  # fmt: skip

    def constants(self, config: LinearConfig) -> dict[str, Any]:
        bits = self.weight.bits
        return {
            "BITS": bits, "SPLIT_GROUPS": bits == 4 and self.group % 64 != 0, "STREAM": len(self.x) <= config.block_t,
            "EXACT": self.x.dtype == torch.float32, "X_UNIT": self.x_unit, "BLOCK_T": config.block_t,
            "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "num_warps": config.warps,
            "num_stages": config.stages,
        }  # fmt: skip
