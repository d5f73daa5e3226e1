"""The calibration ops against eager torch, torch.compile and bare dW, per projection shape.

Peers of weight_salience: "eager" forms dW of each sequence, multiplies, takes the three orders and
sums; "tiled" is the strongest eager form, the same in cache-sized panels; "compiled" and "compiled tiled"
are both with the work on one dW, or one panel of it, under torch.compile; "dW" is the bare product of all
tokens, with nothing reduced. CPU: fp32, two shapes; CUDA: bf16, all shapes. Ratios
are ours / peer in time, variants interleaved, operands rotated. Memory is the peak of one call above the operands.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import saap_kernels as K
from benchmarks.common import Row, run
from benchmarks.shapes import MODELS, TOKENS, Projection
from benchmarks.timing import Variant, interleave, matmul_rate, peaks, read_bandwidth
from saap_kernels import reference
from saap_kernels.reference import panel_rows

ASKED_GPU = {"eager": 0.2, "compiled": 0.5}
ROTATED_BYTES = 256 << 20  # operand sets together, past any cache


Lines = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def lines_of(x: Tensor, dy: Tensor, w: Tensor, dim: int) -> Tensor:
    """(3, lines): what a user writes first for one sequence; dW is a tensor of the size of ``w``."""
    s = (w * (dy.T @ x)).float()
    square = s * s
    return torch.stack([f.sum(dim) for f in (s.abs(), square, (s - 0.5 * square).abs())])


def eager_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Sequence[tuple[int, int]], axis: str, unit: int, lines: Lines = lines_of
) -> Tensor:
    """(3, S, U) by one dW per sequence."""
    dim = 1 if axis == "out" else 0
    rows = [lines(x[start:stop], dy[start:stop], w, dim).unflatten(1, (-1, unit)).sum(2) for start, stop in spans]
    return torch.stack(rows, 1)


def tiled_salience(
    x: Tensor, dy: Tensor, w: Tensor, spans: Sequence[tuple[int, int]], axis: str, unit: int, lines: Lines
) -> Tensor:
    """(3, S, U) by panels of dW that fit a cache."""
    step, dim = panel_rows(w.shape[1], w.shape[0], unit if axis == "out" else 1), 1 if axis == "out" else 0
    rows = []
    for start, stop in spans:
        x_n, dy_n = x[start:stop], dy[start:stop]
        parts = [lines(x_n, dy_n[:, r : r + step], w[r : r + step], dim) for r in range(0, len(w), step)]
        whole = torch.cat(parts, 1) if axis == "out" else torch.stack(parts).sum(0)
        rows.append(whole.unflatten(1, (-1, unit)).sum(2))
    return torch.stack(rows, 1)


def operands(
    shape: Projection, sequences: int, length: int, dtype: torch.dtype, device: str
) -> list[tuple[Tensor, ...]]:
    """Enough (x, dy, w) sets to rotate past the caches."""
    tokens = sequences * length
    size = (tokens * (shape.rows + shape.columns) + shape.rows * shape.columns) * dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(max(2, min(8, -(-ROTATED_BYTES // size)))):
        extents = ((tokens, shape.columns), (tokens, shape.rows), (shape.rows, shape.columns))
        sets.append(tuple(torch.randn(*e, generator=generator).to(device, dtype) for e in extents))
    return sets


def weight_rows(shape: Projection, sequences: int, length: int, repeats: int, rate: float, compiled: bool) -> list[Row]:
    """weight_salience and coupled_salience on one shape."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    sets = operands(shape, sequences, length, dtype, device)
    ranges = [(i * length, (i + 1) * length) for i in range(sequences)]
    spans = torch.tensor(ranges, dtype=torch.int32)
    options = {"axis": shape.axis, "unit_size": shape.unit_size}
    orders = ["abs", "square", "mixed"]
    variants: dict[str, Variant] = {
        "ours": lambda i: K.weight_salience(*sets[i], spans, **options),
        "coupled": lambda i: K.coupled_salience(*sets[i], spans, **options),
        "eager": lambda i: eager_salience(*sets[i], ranges, shape.axis, shape.unit_size),
        "tiled": lambda i: reference.weight_salience(*sets[i], spans, shape.axis, shape.unit_size, None, orders, 1.0),
        "dW": lambda i: sets[i][1].T @ sets[i][0],
    }
    if compiled:
        torch.compiler.reset()  # shapes of an earlier row must not make these dynamic
        one, panel = torch.compile(lines_of, dynamic=False), torch.compile(lines_of, dynamic=False)
        variants["compiled"] = lambda i: eager_salience(*sets[i], ranges, shape.axis, shape.unit_size, one)
        variants["compiled tiled"] = lambda i: tiled_salience(*sets[i], ranges, shape.axis, shape.unit_size, panel)
    seconds, memory = interleave(variants, repeats, len(sets), device), peaks(variants, device)
    flops = 2 * sequences * length * shape.rows * shape.columns
    case = f"weight_salience {shape.name} {sequences}x{length}"
    on_gpu = device == "cuda"
    long = length >= 2048
    rows = [
        Row.single(f"{case}, arithmetic", flops / seconds["ours"] / 1e12, "TFLOP/s"),
        Row.single(f"{case}, share of matmul peak", flops / seconds["ours"] / rate, "share"),
        Row.single(f"{case}, peak memory", memory["ours"] / 2**20, "MiB"),
    ]
    for peer in ("eager", "compiled", "tiled", "compiled tiled", "dW"):
        if peer in seconds:
            limit = 1 / 0.85 if peer == "dW" and long else ASKED_GPU.get(peer) if not long else None
            asked = f"<= {limit:.2f}" if on_gpu and limit else ""
            rows.append(Row.compare(f"{case} / {peer}", seconds["ours"] * 1e3, seconds[peer] * 1e3, "ms", asked))
            rows.append(Row.single(f"{case}: {peer}, peak memory", memory[peer] / 2**20, "MiB"))
    asked = "<= 1.67" if on_gpu and long else ""
    rows.append(Row.compare(f"coupled{case[6:]} / dW", seconds["coupled"] * 1e3, seconds["dW"] * 1e3, "ms", asked))
    return rows


def activation_rows(tokens: int, features: int, bandwidth: float, repeats: int) -> list[Row]:
    """The fused pass against its parts in eager torch, and against the measured read bandwidth."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    sets = [tuple(torch.randn(tokens, features).to(device, dtype) for _ in range(2)) for _ in range(2)]
    spans = torch.tensor([[i, i + 128] for i in range(0, tokens, 128)], dtype=torch.int32)
    shift = torch.zeros(features, device=device)

    def eager(index: int) -> object:
        x, dx = (t.unflatten(0, (-1, 128)).float() for t in sets[index])
        return (x * dx).sum(1), x.sum(1), x.square().sum(1), x.abs().amax(1)

    variants: dict[str, Variant] = {
        "ours": lambda i: K.activation_salience_statistics(*sets[i], spans, shift=shift),
        "eager": eager,
    }
    seconds = interleave(variants, repeats, 2, device)
    memory, size = peaks(variants, device), 2 * tokens * features * dtype.itemsize
    case = f"activation_salience_statistics {tokens}x{features}"
    asked = ">= 0.9" if device == "cuda" else ""
    return [
        Row.single(f"{case}, reading", size / seconds["ours"] / 1e9, "GB/s"),
        Row.single(f"{case}, share of read bandwidth", size / seconds["ours"] / bandwidth, "share", asked),
        Row.compare(f"{case} / eager", seconds["ours"] * 1e3, seconds["eager"] * 1e3, "ms"),
        Row.single(f"{case}, peak memory", memory["ours"] / 2**20, "MiB"),
        Row.single(f"{case}: eager, peak memory", memory["eager"] / 2**20, "MiB"),
    ]


def measure(quick: bool) -> list[Row]:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    bandwidth = read_bandwidth(device, 1 << 26 if quick else 1 << 28)
    rate = matmul_rate(device, torch.bfloat16 if on_gpu else torch.float32, 8192 if on_gpu else 1024)
    rows = [Row.single("read bandwidth", bandwidth / 1e9, "GB/s"), Row.single("matmul peak", rate / 1e12, "TFLOP/s")]
    if on_gpu:
        shapes = [shape for model in MODELS.values() for shape in model]
        tokens = TOKENS
    else:
        shapes = list(MODELS["Llama-2-7B"][3:])
        tokens = ((10, 64),)
    if quick:
        shapes = [Projection("small", 512, 384, "out", 1), Projection("small", 384, 512, "in", 128)]
        tokens = ((4, 64),)
    for sequences, length in tokens:
        for shape in shapes:
            rows += weight_rows(shape, sequences, length, 3 if quick or not on_gpu else 21, rate, compiled=not quick)
    extent = (1024, 1000) if quick else (16384, 8192) if on_gpu else (8192, 4096)
    return rows + activation_rows(*extent, bandwidth, 3 if quick else 15)


if __name__ == "__main__":
    run(__doc__ or "", measure)
