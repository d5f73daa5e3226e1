"""The cost model's kernels: what each variant of calibration_kernels should take on a GPU, from data sheets.

A kernel's time is the largest of its parts' times (matrix units, memory) plus what does not overlap with them.
Every assumption is a named constant, so that a measurement that disagrees says which one is wrong. The tile of each
shape is the one that the kernels would choose.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks import activation_rows, weight_salience_rows
from benchmarks.common import Row
from benchmarks.eager_forms import PANEL_BYTES, panel_rows
from benchmarks.timing import Rates
from benchmarks.weight_salience_rows import Problem
from saap_kernels import tiled_salience
from saap_kernels.planes import rows_per_partial
from saap_kernels.triton_weight_salience import TileConfig, choose_config

# assumptions
MATMUL_SHARE = 0.70  # of the dense peak that cuBLAS sustains on large matrices
TILE_SHARE = 0.60  # of it that our loop over token blocks does, by wgmma
CUDA_TILE_SHARE = 0.35  # the same by mma.sync, as the CUDA C++ backend does
BANDWIDTH_SHARE = 0.92  # of the data-sheet bandwidth that a read reaches
CACHE_BANDWIDTH = 5.5e12  # bytes per second of the L2 cache
EPILOGUE_INSTRUCTIONS = 9  # per element and sequence: convert w, multiply, three orders, three additions
COUPLED_INSTRUCTIONS = 3  # convert w, multiply-add to the mean and to the square
CUDA_TILE = {False: TileConfig(128, 128, 32, 8, 4), True: TileConfig(64, 128, 32, 8, 4)}  # csrc/weight_salience.cu
GAP_SECONDS = 1.5e-6  # between the kernels of a captured graph
LAUNCH_KERNELS = 3  # of one launch of ours: itself, the sum of its tiles, the factor of an order
# bytes moved per weight and sequence: eager: bf16 dW and product, then fp32 temporaries of three orders; compiled: dW
# written and read, w read. Coupled: fp32 accumulators are read and written too
MOVED = {"eager": 70, "compiled": 6}
COUPLED_MOVED = {"eager": 54, "compiled": 22}
KERNELS = {"eager": 13, "compiled": 2}  # per sequence
PANEL_KERNELS = {"tiled": 6, "compiled tiled": 2}  # per panel and sequence
PANEL_MOVED = {"tiled": 16, "compiled tiled": 2}  # bytes per weight and sequence, in the cache
KEPT = {"eager": 20, "compiled": 2}  # bytes alive at once per weight
ACCUMULATORS = 8  # bytes per weight of the coupled peers' two in fp32


@dataclass(frozen=True)
class Device:
    """Data-sheet figures: dense bf16 FLOP/s, bytes/s, multiprocessors, clock, fp32 lanes of a multiprocessor."""

    name: str
    flops: float
    bandwidth: float
    processors: int = 132
    clock: float = 1.755e9
    lanes: int = 128

    def read(self, size: float) -> float:
        return size / (self.bandwidth * BANDWIDTH_SHARE)

    @property
    def rates(self) -> Rates:
        return Rates(self.flops * MATMUL_SHARE, self.bandwidth * BANDWIDTH_SHARE, "cuda", torch.bfloat16)


DEVICES = (Device("H100 SXM", 989e12, 3.35e12), Device("H200", 989e12, 4.8e12))


def weights(problem: Problem) -> int:
    return problem.shape.rows * problem.shape.columns


def operand_bytes(problem: Problem) -> float:
    """Of x and dy in bf16."""
    return 2.0 * problem.tokens * (problem.shape.rows + problem.shape.columns)


def bare_product(problem: Problem, device: Device) -> float:
    """Seconds of dW of all tokens in cuBLAS: written once, nothing reduced."""
    arithmetic = problem.flops / (device.flops * MATMUL_SHARE)
    return max(arithmetic, device.read(operand_bytes(problem) + 2 * weights(problem))) + GAP_SECONDS


def extents(problem: Problem) -> tuple[int, int]:
    """Lines of units and the entries of each, as the kernels see a weight."""
    rows, columns = problem.shape.rows, problem.shape.columns
    return (rows, columns) if problem.shape.axis == "out" else (columns, rows)


def frozen_config(problem: Problem, device: Device, coupled: bool) -> TileConfig:
    options = {"coupled": coupled, "processors": device.processors, "capability": 90}
    return choose_config(*extents(problem), torch.bfloat16, **options)


def partial_bytes(problem: Problem, config: TileConfig) -> int:
    """Of the partial sums of one sequence, three orders."""
    lines, entries = extents(problem)
    return 4 * 3 * lines * math.ceil(entries / config.block_r)


def launch_bytes(problem: Problem) -> int:
    """What the partial sums of one launch may take: half of w in bf16, or a little where w is small."""
    return max(tiled_salience.PARTIAL_BYTES, weights(problem))


def ours(
    problem: Problem, device: Device, *, coupled: bool = False, cuda: bool = False, limit: int | None = None
) -> float:
    """Seconds of weight_salience (or coupled_salience): launches of whole waves of tiles, each all sequences long.

    ``limit``: bytes of partial sums of one launch (None: the kernels'); each launch reads w again.
    """
    lines, entries = extents(problem)
    config = CUDA_TILE[coupled] if cuda else frozen_config(problem, device, coupled)
    share, elements = CUDA_TILE_SHARE if cuda else TILE_SHARE, config.block_u * config.block_r
    step = 2 * elements * config.block_t / (device.flops * share / device.processors)
    instructions = COUPLED_INSTRUCTIONS if coupled else EPILOGUE_INSTRUCTIONS
    epilogue = elements * instructions / (device.lanes * device.clock)
    products = math.ceil(problem.length / config.block_t) * step
    # two programs on a multiprocessor hide one's epilogue behind the other's products
    together = config.per_processor
    per_sequence = max(products, epilogue, (products + epilogue) / together) if together > 1 else products + epilogue
    # a tile of w arrives before the first product
    weight = device.read(2 * elements) * device.processors / together
    waves = math.ceil(math.ceil(lines / config.block_u) * math.ceil(entries / config.block_r) / device.processors)
    partial = partial_bytes(problem, config)
    step_sequences = problem.sequences if coupled else max(1, (limit or launch_bytes(problem)) // partial)
    launches = math.ceil(problem.sequences / step_sequences)
    arithmetic = waves * (problem.sequences * per_sequence + launches * weight)
    sums = 2 * partial * (1 if coupled else problem.sequences)
    memory = device.read(operand_bytes(problem) + 2 * weights(problem) * launches + sums)
    return max(arithmetic, memory) + launches * LAUNCH_KERNELS * GAP_SECONDS


def weight_sized(problem: Problem, device: Device, bytes_per_weight: float, kernels: int) -> float:
    """Seconds of a form that makes dW of each sequence and moves ``bytes_per_weight`` about."""
    one = replace(problem, sequences=1)
    product = max(one.flops / (device.flops * MATMUL_SHARE), device.read(operand_bytes(one)))
    moved = device.read(bytes_per_weight * weights(problem))
    return problem.sequences * (product + moved + kernels * GAP_SECONDS)


def tiled(problem: Problem, device: Device, peer: str) -> float:
    """Seconds of dW in panels that stay in the cache; w is read once per sequence."""
    shape = problem.shape
    unit = shape.unit_size if shape.axis == "out" else 1
    panels = shape.rows // panel_rows(shape.rows, shape.columns, unit, PANEL_BYTES["cuda"] // 2)
    cached = PANEL_MOVED[peer] * weights(problem) / CACHE_BANDWIDTH + device.read(2 * weights(problem))
    per_sequence = cached + panels * PANEL_KERNELS[peer] * GAP_SECONDS
    return bare_product(problem, device) + problem.sequences * per_sequence


def predicted_seconds(problem: Problem, device: Device) -> dict[str, float]:
    """Of every variant of ``weight_salience_rows``."""
    found = {"dW": bare_product(problem, device)}
    for op, coupled, moved in (("weight_salience", False, MOVED), ("coupled_salience", True, COUPLED_MOVED)):
        found[op] = ours(problem, device, coupled=coupled)
        found[f"{op} / cuda"] = ours(problem, device, coupled=coupled, cuda=True)
        for peer, size in moved.items():
            found[f"{op} / {peer}"] = weight_sized(problem, device, size, KERNELS[peer])
    for peer in PANEL_KERNELS:
        found[f"weight_salience / {peer}"] = tiled(problem, device, peer)
    return found


def predicted_bytes(problem: Problem, device: Device) -> dict[str, float]:
    """Peak above the operands: partial sums of one launch and results, dW, or what is made of it."""
    size, result = weights(problem), 4.0 * 3 * extents(problem)[0]
    results = result * problem.sequences
    found = {"dW": 2.0 * size}
    for op, coupled in (("weight_salience", False), ("coupled_salience", True)):
        for name, config in ((op, frozen_config(problem, device, coupled)), (f"{op} / cuda", CUDA_TILE[coupled])):
            partial = partial_bytes(problem, config)
            sequences = max(1, min(problem.sequences, launch_bytes(problem) // partial))
            found[name] = partial + result if coupled else partial * sequences + results
    for peer, kept in KEPT.items():
        found[f"weight_salience / {peer}"] = kept * size + results
        found[f"coupled_salience / {peer}"] = (kept + ACCUMULATORS) * size + result
    found["weight_salience / tiled"] = 2.0 * PANEL_BYTES["cuda"] + results
    found["weight_salience / compiled tiled"] = 1.0 * PANEL_BYTES["cuda"] + results
    return found


def weight_rows(problem: Problem, device: Device) -> Iterator[Row]:
    """Every row that calibration_kernels measures on one shape unless asked for others."""
    peers = weight_salience_rows.default_peers(problem.length, on_gpu=True, quick=False)
    seconds, memory = predicted_seconds(problem, device), predicted_bytes(problem, device)
    seconds = {
        name: time for name, time in seconds.items() if name.split(" / ")[-1] in (*peers, *weight_salience_rows.OPS)
    }
    for op in weight_salience_rows.OPS:
        yield from weight_salience_rows.rows_of(op, problem, device.rates, seconds, memory, on_gpu=True)


# of the activation ops: bytes moved per element of x and of dx by each form, and alive at once
ACTIVATION_MOVED = {"eager": (40, 30), "strongest eager": (6, 4), "compiled": (2, 2)}
ACTIVATION_KEPT = {"eager": 8, "strongest eager": 2, "compiled": 0}
PLANES = {"activation_salience": 1, "activation_statistics": 3, "activation_salience_statistics": 4}


def activations(op: str, extent: tuple[int, int, int], device: Device) -> Iterator[Row]:
    """Rows of one activation op: operands read once; sums of every plane written, and read if they are in parts."""
    tokens, features, length = extent
    operands = activation_rows.OPERANDS[op]
    size, rows = 2.0 * operands * tokens * features, rows_per_partial(tokens)
    blocks = tokens // length * math.ceil(length / rows)
    written = PLANES[op] * 4.0 * features * (blocks if length <= rows else 2 * blocks + tokens // length)
    mine = device.read(size + written) + GAP_SECONDS * (1 if length <= rows else 2)
    seconds = {"ours": mine, "cuda": mine}
    memory = {"ours": written, "cuda": written}
    for peer, (of_x, of_dx) in ACTIVATION_MOVED.items():
        moved = (of_x + of_dx * (operands - 1)) * tokens * features
        seconds[peer] = device.read(moved) + KERNELS["eager"] * GAP_SECONDS
        memory[peer] = ACTIVATION_KEPT[peer] * operands * tokens * features + written
    yield from activation_rows.rows_of(op, extent, device.rates, seconds, memory, on_gpu=True)
