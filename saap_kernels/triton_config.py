"""Which tiles the Triton inference kernels run with, by class of shape, and what both are launched with."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saap_kernels.packed import PackedWeight
from saap_kernels.splits import split_count

FEW_TOKENS = 16  # up to here a product is bound by reading the weight
FINISH_N = 256  # results of one program of a second kernel
PROGRAMS = 2  # of one multiprocessor, below which K is split: their reads keep its share of memory busy
WHOLE_ROW = 1 << 30  # the group of rows of one group: widths that differ compile nothing new


@dataclass(frozen=True)
class Problem:
    """What a configuration depends on; ``rows`` is N or F, ``group`` columns share a scale, ``dtype`` is x's."""

    tokens: int
    rows: int
    columns: int
    bits: int
    group: int
    dtype: torch.dtype
    gated: bool
    processors: int
    capability: int


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
    config = _tile(problem)
    config = replace(config, block_k=step_columns(config.block_k, problem.bits, problem.group))
    if problem.tokens > FEW_TOKENS:
        return config
    tiles, steps = -(-problem.rows // config.block_n), -(-problem.columns // config.block_k)
    wanted = PROGRAMS * problem.processors
    return replace(config, splits=split_count(tiles, steps, wanted, enough=wanted))


def _tile(problem: Problem) -> LinearConfig:
    """What fits the registers, and 99 KiB of shared memory, which is all that devices other than Hopper may have."""
    hopper = 90 <= problem.capability < 100
    if problem.dtype == torch.float32:  # the correctness path
        return LinearConfig(16, 32, 32, 4, 2)
    if problem.tokens <= FEW_TOKENS:
        # 16 KiB of weight a step (int4: 8 KiB; gate and up: twice 16 KiB), for two programs on a multiprocessor
        if problem.gated:
            return LinearConfig(16, 64, 128, 4, 4 if hopper else 3)
        return LinearConfig(16, 64 if problem.bits == 16 else 128, 128, 4, 4)
    if problem.gated:
        return LinearConfig(128, 128 if hopper else 64, 64, 8, 3)
    return LinearConfig(128, 128, 64 if hopper else 32, 8, 4)


def step_columns(most: int, bits: int, group: int) -> int:
    """Columns of one step: they lie within a group, and int4 takes whole blocks of 64."""
    columns = most
    while bits != 16 and group % columns and columns > 32:
        columns //= 2
    return max(columns, 64) if bits == 4 else columns


def processors_and_capability(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and ten times the compute capability; elsewhere, where kernels are interpreted, one of 80."""
    if device.type != "cuda":
        return 1, 80
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major * 10 + properties.minor


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
        x, weight = self.x, self.weight
        return Problem(
            len(x), weight.rows, self.columns, weight.bits, self.group, x.dtype, gated,
            *processors_and_capability(x.device),
        )  # fmt: skip

    @property
    def _pitch(self) -> int:
        """Of x; that of a single token is not used."""
        return self.x.stride(0) if len(self.x) > 1 else 0

    @property
    def _x_unit(self) -> int:
        """What x's pitch is passed in multiples of: Triton sees only by such a factor that rows are aligned."""
        return 1 if self._pitch % 8 else 8

    def grid(self, config: LinearConfig) -> tuple[int, int]:
        """Tiles of all padded rows, which gated results have too, by splits."""
        return -(-self.weight.data.shape[-2] // config.block_n) * -(-len(self.x) // config.block_t), config.splits

    def sizes(self, config: LinearConfig) -> tuple[int, ...]:
        """K, x's pitch, rows and pitch of the data, groups of a row, steps of one split."""
        data, steps = self.weight.data, -(-self.columns // config.block_k)
        groups = 1 if self.weight.scale is None else self.weight.scale.shape[-1]
        pitch = self._pitch // self._x_unit
        return self.columns, pitch, data.shape[-2], data.shape[-1], groups, -(-steps // config.splits)

    def constants(self, config: LinearConfig) -> dict[str, Any]:
        return {
            "BITS": self.weight.bits, "GROUP": self.group, "STREAM": len(self.x) <= config.block_t,
            "EXACT": self.x.dtype == torch.float32, "X_UNIT": self._x_unit, "BLOCK_T": config.block_t,
            "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "num_warps": config.warps,
            "num_stages": config.stages,
        }  # fmt: skip
