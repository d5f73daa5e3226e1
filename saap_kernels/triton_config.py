"""Which tiles the Triton inference kernels run with, by class of shape, and what both are launched with."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saap_kernels.packed import PackedWeight

FEW_TOKENS = 16  # up to here a product is bound by reading the weight
FINISH_N = 256  # results of one program of a second kernel
PROGRAMS = 2  # of one multiprocessor, below which K is split
SHORTEST_SPLIT = 4  # steps: a program reads three ahead
WHOLE_ROW = 1 << 30  # the group of rows of one group: widths that differ compile nothing new


@dataclass(frozen=True)
class Problem:
    """What a configuration depends on: T, N or F, K, and ``group`` columns of one scale, of x's dtype."""

    tokens: int
    rows: int
    columns: int
    bits: int
    group: int
    dtype: torch.dtype
    gated: bool
    processors: int


@dataclass(frozen=True)
class LinearConfig:
    """A tile of tokens by rows, columns of one step, programs that share a tile's K, and how it is run."""

    block_t: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1


def choose_config(problem: Problem) -> LinearConfig:
    """A frozen tile by class of shape, so that pruned layers compile nothing new; K is split where tiles are few."""
    few, quantised = problem.tokens <= FEW_TOKENS, problem.bits != 16
    if problem.dtype == torch.float32:  # the correctness path
        config = LinearConfig(16, 64, 32, 4, 2)
    elif few:
        # 16 KiB of weight a step (8 KiB of int4), three steps in flight, two programs on a multiprocessor
        config = LinearConfig(16, 128 if quantised and not problem.gated else 64, 128, 4, 4)
    elif problem.gated:
        config = LinearConfig(128, 64, 64, 4, 3)
    else:
        config = LinearConfig(128, 128, 64, 8, 4)
    config = replace(config, block_k=step_columns(config.block_k, problem.bits, problem.group))
    if not few:
        return config
    tiles, steps = -(-problem.rows // config.block_n), -(-problem.columns // config.block_k)
    return replace(config, splits=split_count(tiles, steps, problem.processors))


def step_columns(most: int, bits: int, group: int) -> int:
    """Columns of one step: they lie within a group, and int4 takes whole blocks of 64."""
    columns = most
    while bits != 16 and group % columns and columns > 32:
        columns //= 2
    return max(columns, 64) if bits == 4 else columns


def split_count(tiles: int, steps: int, processors: int) -> int:
    """Programs that share the ``steps`` of one tile: enough for two on each multiprocessor, none without a step.

    Reads of two programs keep a multiprocessor's share of memory busy; one shorter than what it reads ahead costs more
    than it brings.
    """
    wanted = -(-PROGRAMS * processors // tiles)
    splits = max(1, min(wanted, steps // SHORTEST_SPLIT))
    return -(-steps // -(-steps // splits))


@dataclass(frozen=True)
class Operands:
    """x, whose first ``columns`` are multiplied, and the packed weight."""

    x: Tensor
    weight: PackedWeight
    columns: int

    @property
    def scale(self) -> Tensor:
        """x in place of what 16-bit weights lack, as a pointer that is not read."""
        return self.x if self.weight.scale is None else self.weight.scale

    @property
    def zero(self) -> Tensor:
        return self.x if self.weight.zero is None else self.weight.zero

    @property
    def group(self) -> int:
        group = self.weight.group_size or WHOLE_ROW
        return WHOLE_ROW if group >= self.weight.columns else group

    def problem(self, *, gated: bool) -> Problem:
        processors = 1
        if self.x.is_cuda:
            processors = torch.cuda.get_device_properties(self.x.device).multi_processor_count
        return Problem(
            len(self.x), self.weight.rows, self.columns, self.weight.bits, self.group, self.x.dtype, gated, processors
        )

    @property
    def _x_unit(self) -> int:
        """What x's pitch is passed in multiples of: Triton sees only by such a factor that rows are aligned."""
        return 1 if self.x.stride(0) % 8 else 8

    def grid(self, config: LinearConfig) -> tuple[int, int]:
        return -(-self.weight.rows // config.block_n) * -(-len(self.x) // config.block_t), config.splits

    def sizes(self, config: LinearConfig) -> tuple[int, ...]:
        """K, x's pitch, rows and pitch of the data, groups of a row, steps of one split."""
        data, steps = self.weight.data, -(-self.columns // config.block_k)
        groups = 1 if self.weight.scale is None else self.weight.scale.shape[-1]
        pitch = self.x.stride(0) // self._x_unit
        return self.columns, pitch, data.shape[-2], data.shape[-1], groups, -(-steps // config.splits)

    def constants(self, config: LinearConfig) -> dict[str, Any]:
        return {
            "BITS": self.weight.bits, "GROUP": self.group, "STREAM": len(self.x) <= config.block_t,
            "EXACT": self.x.dtype == torch.float32, "X_UNIT": self._x_unit, "BLOCK_T": config.block_t,
            "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "num_warps": config.warps,
            "num_stages": config.stages,
        }  # fmt: skip
