"""What every row of calibration_kernels and calibrate_model should be on a GPU, predicted: nothing here was measured.

A kernel's time is the largest of its parts' times (matrix units, memory) plus what does not overlap with them.
The inputs are data-sheet figures and the assumptions below, each a named constant, so that a measurement that
disagrees says which one is wrong. The tile of each shape is the one the Triton kernel would choose. Usage:
``python -m benchmarks.cost_model [--json FILE]``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.common import Row, run
from benchmarks.shapes import MODELS, TOKENS, Projection
from saap_kernels.planes import rows_per_partial
from saap_kernels.reference import panel_rows
from saap_kernels.tiled_salience import PARTIAL_BYTES
from saap_kernels.triton_weight_salience import choose_config

# assumptions
MATMUL_SHARE = 0.70  # of the dense peak that cuBLAS sustains on large matrices
TILE_SHARE = 0.60  # of it that our loop over token blocks does
BANDWIDTH_SHARE = 0.92  # of the data-sheet bandwidth that a read reaches
EPILOGUE_INSTRUCTIONS = 9  # per element and sequence: convert w, multiply, three orders, three additions
COUPLED_INSTRUCTIONS = 3  # convert w, multiply-add to the mean and to the square
PREDICTED = "predicted from the assumptions of benchmarks.cost_model, not measured"
GAP_SECONDS = 1.5e-6  # between the kernels of a captured graph
EAGER_BYTES = 70  # moved per weight by eager: bf16 dW and product, then fp32 temporaries of three orders
COMPILED_BYTES = 6  # dW written and read, w read; one fused reduction
EAGER_KERNELS, PANEL_KERNELS, COMPILED_KERNELS = 13, 12, 2  # per sequence; per panel and sequence
EAGER_ACTIVATION_BYTES = 60  # moved per element by eager's sums: fp32 copies, product, square, absolute value
EAGER_KEPT, EAGER_ACTIVATION_KEPT = 20, 12  # bytes alive at once per weight and per element, in fp32


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


DEVICES = (Device("H100 SXM", 989e12, 3.35e12), Device("H200", 989e12, 4.8e12))


@dataclass(frozen=True)
class Problem:
    """A projection and the sequences it is calibrated on, in bf16."""

    shape: Projection
    sequences: int
    length: int

    @property
    def weights(self) -> int:
        return self.shape.rows * self.shape.columns

    @property
    def flops(self) -> float:
        return 2.0 * self.weights * self.sequences * self.length

    @property
    def operand_bytes(self) -> float:
        return 2.0 * self.sequences * self.length * (self.shape.rows + self.shape.columns)


def bare_product(problem: Problem, device: Device) -> float:
    """Seconds of dW of all tokens in cuBLAS: written once, nothing reduced."""
    arithmetic = problem.flops / (device.flops * MATMUL_SHARE)
    return max(arithmetic, device.read(problem.operand_bytes + 2 * problem.weights)) + GAP_SECONDS


def ours(problem: Problem, device: Device, *, coupled: bool = False) -> float:
    """Seconds of weight_salience (or coupled_salience): whole waves of tiles, each all sequences long."""
    shape = problem.shape
    lines, entries = (shape.rows, shape.columns) if shape.axis == "out" else (shape.columns, shape.rows)
    config = choose_config(lines, entries, torch.bfloat16, coupled=coupled, processors=device.processors, capability=90)
    tiles = math.ceil(lines / config.block_u) * math.ceil(entries / config.block_r)
    elements = config.block_u * config.block_r
    blocks = math.ceil(problem.length / config.block_t)
    step = 2 * elements * config.block_t / (device.flops * TILE_SHARE / device.processors)
    instructions = COUPLED_INSTRUCTIONS if coupled else EPILOGUE_INSTRUCTIONS
    epilogue = elements * instructions / (device.lanes * device.clock)
    # two programs on a multiprocessor hide one's epilogue behind the other's products
    per_sequence = blocks * step + epilogue
    if config.per_processor > 1:
        per_sequence = max(blocks * step, epilogue, per_sequence / config.per_processor)
    waves = math.ceil(tiles / device.processors)
    arithmetic = waves * problem.sequences * per_sequence
    partial = 4.0 * 3 * lines * math.ceil(entries / config.block_r) * (1 if coupled else problem.sequences)
    memory = device.read(problem.operand_bytes + 2 * problem.weights + 2 * partial)
    return max(arithmetic, memory) + 2 * GAP_SECONDS


def weight_sized(problem: Problem, device: Device, bytes_per_weight: float, kernels: int) -> float:
    """Seconds of a form that makes dW of each sequence and moves ``bytes_per_weight`` about."""
    one = replace(problem, sequences=1)
    product = max(one.flops / (device.flops * MATMUL_SHARE), device.read(one.operand_bytes))
    return problem.sequences * (product + device.read(bytes_per_weight * problem.weights) + kernels * GAP_SECONDS)


def tiled(problem: Problem, device: Device, kernels: int) -> float:
    """Seconds of dW in panels that stay in the cache, ``kernels`` launches for each."""
    rows, columns = problem.shape.rows, problem.shape.columns
    unit = problem.shape.unit_size if problem.shape.axis == "out" else 1
    panels = math.ceil(rows / panel_rows(columns, rows, unit))
    return bare_product(problem, device) + problem.sequences * panels * kernels * GAP_SECONDS


def kept_bytes(problem: Problem) -> dict[str, float]:
    """Peak bytes above the operands: partial sums of one launch and results, dW, or what is made of it."""
    shape, panel = problem.shape, panel_rows(problem.shape.columns, problem.shape.rows, 1) * problem.shape.columns
    lines, entries = (shape.rows, shape.columns) if shape.axis == "out" else (shape.columns, shape.rows)
    config = choose_config(lines, entries, torch.bfloat16, coupled=False, processors=132, capability=90)
    result = 4.0 * 3 * lines * problem.sequences
    return {
        "ours": min(result * math.ceil(entries / config.block_r), PARTIAL_BYTES) + result,
        "eager": EAGER_KEPT * problem.weights + result,
        "compiled": 2.0 * problem.weights + result,
        "tiled": EAGER_KEPT * panel + result,
        "compiled tiled": 2.0 * panel + result,
        "dW": 2.0 * problem.weights,
    }


def rows_of(problem: Problem, device: Device) -> list[Row]:
    mine, coupled = ours(problem, device), ours(problem, device, coupled=True)
    long = problem.length >= 2048
    peers = {
        "eager": (weight_sized(problem, device, EAGER_BYTES, EAGER_KERNELS), "" if long else "<= 0.20"),
        "compiled": (weight_sized(problem, device, COMPILED_BYTES, COMPILED_KERNELS), "" if long else "<= 0.50"),
        "tiled": (tiled(problem, device, PANEL_KERNELS), ""),
        "compiled tiled": (tiled(problem, device, COMPILED_KERNELS), ""),
        "dW": (bare_product(problem, device), "<= 1.18" if long else ""),
    }
    case = f"{problem.shape.name} {problem.sequences}x{problem.length}"
    memory, name = kept_bytes(problem), f"weight_salience {case}"
    rows = [
        single(f"{name}, arithmetic", problem.flops / mine / 1e12, "TFLOP/s", device),
        single(f"{name}, share of matmul peak", problem.flops / mine / (device.flops * MATMUL_SHARE), "share", device),
        single(f"{name}, peak memory", memory["ours"] / 2**20, "MiB", device),
    ]
    for peer, (time, asked) in peers.items():
        rows.append(predicted(f"{name} / {peer}", mine, time, device, asked))
        rows.append(single(f"{name}: {peer}, peak memory", memory[peer] / 2**20, "MiB", device))
    return [
        *rows,
        predicted(f"coupled_salience {case} / dW", coupled, peers["dW"][0], device, "<= 1.67" if long else ""),
    ]


def activation_rows(tokens: int, features: int, length: int, device: Device) -> list[Row]:
    """activation_salience_statistics: two bf16 operands read once; sums of 4 planes written, and read if in parts."""
    operands = 2 * 2.0 * tokens * features
    blocks = tokens / length * math.ceil(length / rows_per_partial(tokens))
    written = 4 * 4.0 * features * (blocks if length <= rows_per_partial(tokens) else 2 * blocks + tokens / length)
    mine = device.read(operands + written) + GAP_SECONDS
    case = f"activation_salience_statistics {tokens}x{features}"
    eager = device.read(EAGER_ACTIVATION_BYTES * tokens * features)
    return [
        single(f"{case}, reading", operands / mine / 1e9, "GB/s", device),
        single(f"{case}, share of read bandwidth", device.read(operands) / mine, "share", device, ">= 0.9"),
        predicted(f"{case} / eager", mine, eager, device, ""),
        single(f"{case}, peak memory", written / 2**20, "MiB", device),
        single(f"{case}: eager, peak memory", EAGER_ACTIVATION_KEPT * tokens * features / 2**20, "MiB", device),
    ]


def calibration_rows(device: Device) -> list[Row]:
    """Llama-2-7B on 10 x 64 tokens in bf16, as calibrate_model: time and memory against every peer of it.

    Every pass reads all weights. LLM-Pruner's procedure runs one sample at a time, writes all gradients, and
    squares, scales and adds them in weight-sized tensors; then it repeats the passes for the whole batch, or
    (without the second pass) adds up the gradients themselves too.
    """
    model, layers, sequences, length, vocabulary = MODELS["Llama-2-7B"], 32, 10, 64, 32000
    hidden, width, tokens = model[0].columns, model[3].rows, sequences * length
    q, k, o, gate, down = model
    projections = [Problem(shape, sequences, length) for shape in (q, k, k, o, gate, gate, down)]
    in_layers = 2.0 * layers * sum(problem.weights for problem in projections)
    weights = in_layers + 2.0 * 2 * vocabulary * hidden

    def products(count: int, token_count: int, size: float) -> float:
        """Seconds of passes over ``size`` bytes of weights, or of gradients: bound by them or by the arithmetic."""
        return count * max(device.read(size), size * token_count / (device.flops * MATMUL_SHARE))

    salience = layers * sum(ours(problem, device) for problem in projections)
    per_token = 2.0 * (14 * hidden + 4 * width)  # as saap.memory.activation_bytes counts
    one_block, inputs = tokens * per_token, layers * tokens * hidden * 2.0
    moved = 2 + 2 + 3  # squared, scaled, added: each reads and writes
    sample = products(3, length, weights) + device.read(moved * weights)
    batch, score = products(3, tokens, weights), device.read(weights)
    peers = {  # seconds, bytes: gradients, their squares, their sum
        "": (sequences * sample + batch + score, 2 * weights + layers * one_block),
        " without second pass": (sequences * (sample + device.read(3 * weights)) + score, 3 * weights),
    }
    rows = []
    for kind, forwards, kept in (("", 1, layers * one_block), (", checkpointing", 2, inputs + one_block)):
        name = f"Llama-2-7B, {sequences} x {length}: "
        rows.append(single(f"{name}ours{kind}, peak memory / weights", 1 + kept / weights, "ratio", device, "<= 1.15"))
        time = products(forwards + 1, tokens, weights) + salience
        for peer, (seconds, size) in peers.items():
            label = f"{name}saap{kind} / LLM-Pruner{peer}"
            rows.append(predicted(label, time, seconds, device, "" if kind or peer else "<= 0.25"))
            rows.append(predicted_bytes(label, kept, size, device, "<= 0.3"))
        plain = products(forwards + 1, tokens, weights) + products(1, tokens, in_layers)
        label = f"{name}saap{kind} / forward and backward with weight gradients"
        rows.append(predicted(label, time, plain, device, "<= 1.2"))
        rows.append(predicted_bytes(label, kept, kept + in_layers, device, ""))
    return rows


def single(case: str, value: float, unit: str, device: Device, asked: str = "") -> Row:
    return Row(f"{device.name}: {case}", value, None, None, unit, PREDICTED, asked)


def predicted(case: str, mine: float, peer: float, device: Device, asked: str) -> Row:
    return Row(f"{device.name}: {case}", mine * 1e3, peer * 1e3, mine / peer, "ms", PREDICTED, asked)


def predicted_bytes(case: str, mine: float, peer: float, device: Device, asked: str) -> Row:
    return Row(f"{device.name}: {case}", mine / 2**20, peer / 2**20, mine / peer, "MiB", PREDICTED, asked)


def measure(quick: bool) -> Sequence[Row]:
    """Predictions for every device, shape and token count of calibration_kernels."""
    models = list(MODELS.values())[: 1 if quick else None]
    rows = []
    for device in DEVICES:
        for sequences, length in TOKENS:
            for shape in (shape for model in models for shape in model):
                rows += rows_of(Problem(shape, sequences, length), device)
        rows += activation_rows(16384, 8192, 128, device)
        rows += calibration_rows(device)
    return rows


if __name__ == "__main__":
    run(__doc__ or "", measure)
