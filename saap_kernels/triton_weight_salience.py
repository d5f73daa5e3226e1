"""Triton: dW of a tile on tensor cores, one sequence at a time, multiplied by w and reduced in registers.

Both axes are one kernel: P (T, U) is the operand on the units' side (dy for rows of w, x for
columns), Q (T, R) the other, and a tile of P'Q covers BLOCK_U lines of units by BLOCK_R entries
that are summed. All sequences' token blocks form one pipelined loop; at the last block of a sequence
the tile is multiplied by w and summed over R into partial[want, sequence, tile of R, U]. A second,
ordered sum adds the tiles of R and the lines of a unit. No atomics, no tensor of w's size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saap_kernels import tiled_salience
from saap_kernels._launch import launching
from saap_kernels.schedule import Spans, masked_blocks, whole_blocks
from saap_kernels.tiled_salience import Operands

TAIL_T = tl.constexpr(16)  # tokens of one step over a sequence's tail, where the kernel reads without descriptors


@triton.jit
def _load(operand, row, count, column, columns, pitch, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    rows = row + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    inside = (column + tl.arange(0, BLOCK)) < columns  # [BLOCK]
    at = rows.to(tl.int64)[:, None] * pitch + (column + tl.arange(0, BLOCK))[None, :]
    return tl.load(operand + at, mask=(rows < row + count)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _store(partial, slot, base, plane, lines, valid, values):
    tl.store(partial + slot * plane + base + lines, values, mask=valid)


@triton.jit(do_not_specialize=["block_count"])  # as the constant 1 it breaks Triton 3.6's compiler for sm_90
def weight_salience_kernel(
    p, q, p_descriptor, q_descriptor, w, blocks, partial,
    U, R, p_columns8, q_columns8, p_pitch8, q_pitch8, w_stride_u, w_stride_r,
    block_count, plane, scale,
    ABS: tl.constexpr, SQUARE: tl.constexpr, MIXED: tl.constexpr,  # plane of partial, or -1
    COUPLED: tl.constexpr, DESCRIPTORS: tl.constexpr, EXACT_FP32: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_U: tl.constexpr,
):  # fmt: skip
    tiles_u = tl.cdiv(U, BLOCK_U)
    tiles_r = tl.cdiv(R, BLOCK_R)
    p_columns, q_columns = p_columns8 * 8, q_columns8 * 8
    p_pitch, q_pitch = p_pitch8 * 8, q_pitch8 * 8
    precision: tl.constexpr = "ieee" if EXACT_FP32 else "tf32"
    for tile in range(tl.program_id(0), tiles_u * tiles_r, tl.num_programs(0)):
        # neighbouring programs share rows of tiles, so that both operands stay in L2
        group = tile // (GROUP_U * tiles_r)
        height = min(tiles_u - group * GROUP_U, GROUP_U)
        inside = tile % (GROUP_U * tiles_r)
        tile_u, tile_r = group * GROUP_U + inside % height, inside // height
        u, r = tile_u * BLOCK_U, tile_r * BLOCK_R
        lines, entries = u + tl.arange(0, BLOCK_U), r + tl.arange(0, BLOCK_R)
        valid = lines < U
        weight = tl.load(  # [BLOCK_U, BLOCK_R], zero outside w: padding adds nothing
            w + lines.to(tl.int64)[:, None] * w_stride_u + entries.to(tl.int64)[None, :] * w_stride_r,
            mask=valid[:, None] & (entries < R)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.zeros((BLOCK_U, BLOCK_R), tl.float32)
        if COUPLED:
            mean = tl.zeros((BLOCK_U, BLOCK_R), tl.float32)
            square = tl.zeros((BLOCK_U, BLOCK_R), tl.float32)
        row, count = tl.load(blocks), tl.load(blocks + 1)
        for block in range(block_count):
            sequence = tl.load(blocks + 5 * block + 2)
            if DESCRIPTORS:
                p_block = p_descriptor.load([row, u])  # [BLOCK_T, BLOCK_U]
                q_block = q_descriptor.load([row, r])  # [BLOCK_T, BLOCK_R]
            else:
                p_block = _load(p, row, count, u, p_columns, p_pitch, BLOCK_T, BLOCK_U)
                q_block = _load(q, row, count, r, q_columns, q_pitch, BLOCK_T, BLOCK_R)
            # read one block ahead: an address loaded in the same step would keep the loads from being pipelined
            row, count = tl.load(blocks + 5 * block + 5), tl.load(blocks + 5 * block + 6)
            acc = tl.dot(p_block.T, q_block, acc, input_precision=precision)
            if sequence >= 0:
                if DESCRIPTORS:
                    tail = tl.load(blocks + 5 * block + 4)
                    tail_row = tl.load(blocks + 5 * block + 3)
                    # in short steps: a whole block's addresses and values do not fit beside acc and weight
                    for step in tl.static_range(0, BLOCK_T, TAIL_T):
                        if tail > step:
                            p_tail = _load(p, tail_row + step, tail - step, u, p_columns, p_pitch, TAIL_T, BLOCK_U)
                            q_tail = _load(q, tail_row + step, tail - step, r, q_columns, q_pitch, TAIL_T, BLOCK_R)
                            acc = tl.dot(p_tail.T, q_tail, acc, input_precision=precision)
                t = acc * weight.to(tl.float32)  # salience / scale
                if COUPLED:
                    mean += t
                    square += t * t
                else:
                    base = (sequence.to(tl.int64) * tiles_r + tile_r) * U
                    if ABS >= 0:
                        _store(partial, ABS, base, plane, lines, valid, tl.sum(tl.abs(t), 1))
                    if SQUARE >= 0:
                        _store(partial, SQUARE, base, plane, lines, valid, tl.sum(t * t, 1))
                    if MIXED >= 0:
                        _store(partial, MIXED, base, plane, lines, valid, tl.sum(tl.abs(t - (0.5 * scale * t) * t), 1))
                acc = tl.zeros((BLOCK_U, BLOCK_R), tl.float32)
        if COUPLED:
            base = tile_r.to(tl.int64) * U
            if ABS >= 0:
                _store(partial, ABS, base, plane, lines, valid, tl.sum(tl.abs(mean), 1))
            if SQUARE >= 0:
                _store(partial, SQUARE, base, plane, lines, valid, tl.sum(square, 1))
            if MIXED >= 0:
                _store(partial, MIXED, base, plane, lines, valid, tl.sum(tl.abs(mean - 0.5 * scale * square), 1))


@dataclass(frozen=True)
class TileConfig:
    """Tile of P'Q, tokens per step, and how it is run."""

    block_u: int
    block_r: int
    block_t: int
    warps: int
    stages: int
    descriptors: bool = False
    per_processor: int = 1  # programs that fit one multiprocessor by registers and shared memory


def choose_config(
    lines: int, entries: int, dtype: torch.dtype, *, coupled: bool, processors: int, capability: int
) -> TileConfig:
    """A frozen tile by shape class: never keyed on exact widths, so pruned layers compile nothing new.

    The additive form keeps one accumulator, so 128 x 256 fits the registers; the coupled form keeps
    three. fp32 is the correctness path. Small weights take smaller tiles, to occupy the device. Descriptors
    and the largest tile are for Hopper alone: Triton 3.7 does not compile descriptor tiles for sm_100 (its pass
    that hoists tensor memory fails), and on sm_120, as on sm_86 and sm_89, a block has 99 KiB of shared memory.
    """
    if dtype == torch.float32:
        return TileConfig(32, 64, 32, 4, 2)
    hopper = 90 <= capability < 100
    if coupled:
        return TileConfig(64, 128, 64, 8, 3, descriptors=hopper)
    if not hopper and -(-lines // 128) * -(-entries // 128) >= processors:
        return TileConfig(128, 128, 32, 8, 4)
    if hopper and -(-lines // 128) * -(-entries // 256) >= processors:
        return TileConfig(128, 256, 64, 8, 3, descriptors=True)
    return TileConfig(64, 128, 64, 4, 3, descriptors=hopper, per_processor=2)


def weight_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float, config: TileConfig | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference.weight_salience``; fp16, bf16 or fp32, (len(want), S, U) fp32."""
    operands = Operands.of(x, dy, w, axis)
    config = config or _config(operands, coupled=False)
    launch = partial(_launch, operands, scale, config, False)
    tiles = -(-operands.entries // config.block_r)
    return tiled_salience.weight_salience(launch, operands, tiles, dy, spans, unit_size, bias, want, scale)


def coupled_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Tensor, axis: str, unit_size: int, bias: Tensor | None,
    want: list[str], scale: float, config: TileConfig | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference.coupled_salience``; fp16, bf16 or fp32, (len(want), U) fp32."""
    operands = Operands.of(x, dy, w, axis)
    config = config or _config(operands, coupled=True)
    launch = partial(_launch, operands, scale, config, True)
    return tiled_salience.coupled_salience(launch, dy, spans, unit_size, bias, want, scale)


def _config(operands: Operands, *, coupled: bool) -> TileConfig:
    processors, capability = 1, 80
    if operands.p.is_cuda:
        properties = torch.cuda.get_device_properties(operands.p.device)
        processors, capability = properties.multi_processor_count, properties.major * 10 + properties.minor
    return choose_config(
        operands.lines, operands.entries, operands.p.dtype,
        coupled=coupled, processors=processors, capability=capability,
    )  # fmt: skip


def _launch(
    operands: Operands, scale: float, config: TileConfig, coupled: bool, spans: Spans, slots: list[int]
) -> Tensor:
    """See ``tiled_salience.Launch``."""
    p, q, device = operands.p, operands.q, operands.p.device
    tiles = -(-operands.lines // config.block_u), -(-operands.entries // config.block_r)
    planes = 1 if coupled else len(spans)
    wanted = sum(slot >= 0 for slot in slots)
    sums = torch.empty(wanted, planes, tiles[1], operands.lines, dtype=torch.float32, device=device)
    p_descriptor: Any = p
    q_descriptor: Any = q
    if config.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        p_descriptor = TensorDescriptor.from_tensor(p, [config.block_t, config.block_u])
        q_descriptor = TensorDescriptor.from_tensor(q, [config.block_t, config.block_r])
    programs = tiles[0] * tiles[1]
    if p.is_cuda:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = min(programs, processors * config.per_processor)
    with launching("weight_salience_kernel", device):
        if config.descriptors:
            blocks = whole_blocks(spans, config.block_t, p.shape[0], device)
        else:
            blocks = masked_blocks(spans, config.block_t, device)
        weight_salience_kernel[(programs,)](
            p, q, p_descriptor, q_descriptor, operands.w, blocks, sums,
            operands.lines, operands.entries, p.shape[1] // 8, q.shape[1] // 8, p.stride(0) // 8, q.stride(0) // 8,
            operands.w_stride_u, operands.w_stride_r, len(blocks) - 1, planes * tiles[1] * operands.lines, float(scale),
            ABS=slots[0], SQUARE=slots[1], MIXED=slots[2],
            COUPLED=coupled, DESCRIPTORS=config.descriptors, EXACT_FP32=p.dtype == torch.float32,
            BLOCK_U=config.block_u, BLOCK_R=config.block_r, BLOCK_T=config.block_t, GROUP_U=8,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return sums
