"""Rows of weight_salience and coupled_salience on one projection shape, for benchmarks.calibration_kernels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import saap_kernels as K
from benchmarks import eager_forms
from benchmarks.common import Row
from benchmarks.shapes import Projection
from benchmarks.timing import Rates, Variant, interleave, peaks

OPS = ("weight_salience", "coupled_salience")
PEERS = ("eager", "tiled", "compiled", "compiled tiled", "dW", "cuda")  # what --variants may name
ASKED_SHORT = {"weight_salience / eager": 0.2, "weight_salience / compiled": 0.5}
ASKED_LONG = {"weight_salience / dW": 1 / 0.85, "coupled_salience / dW": 1 / 0.6}
LONG = 2048  # tokens of a sequence from which on dW is what counts, and nothing compiled is measured unless chosen
ROTATED_BYTES = 256 << 20  # operand sets together, past any cache


@dataclass(frozen=True)
class Problem:
    """A projection and the sequences it is calibrated on."""

    shape: Projection
    sequences: int
    length: int

    @property
    def case(self) -> str:
        return f"{self.shape.name} {self.sequences}x{self.length}"

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def flops(self) -> float:
        return 2.0 * self.tokens * self.shape.rows * self.shape.columns

    @property
    def elements(self) -> int:
        """Of x, dy and w together: what is read at least."""
        rows, columns = self.shape.rows, self.shape.columns
        return self.tokens * (rows + columns) + rows * columns


def default_peers(length: int, on_gpu: bool, quick: bool) -> tuple[str, ...]:
    """What is measured unless something is chosen: nothing compiled where nothing is asked of it."""
    left_out = {"compiled", "compiled tiled"} if quick or length >= LONG else set()
    return tuple(name for name in PEERS if name not in left_out and (name != "cuda" or on_gpu))


def operands(problem: Problem, rates: Rates) -> list[tuple[Tensor, ...]]:
    """Enough (x, dy, w) sets, drawn on the device, to rotate past the caches."""
    shape, size = problem.shape, problem.elements * rates.dtype.itemsize
    extents = ((problem.tokens, shape.columns), (problem.tokens, shape.rows), (shape.rows, shape.columns))
    generator = torch.Generator(rates.device).manual_seed(0)
    return [
        tuple(torch.randn(*e, generator=generator, device=rates.device, dtype=rates.dtype) for e in extents)
        for _ in range(max(2, min(8, -(-ROTATED_BYTES // size))))
    ]


def variants_of(
    problem: Problem, sets: list[tuple[Tensor, ...]], chosen: Sequence[str], on_gpu: bool
) -> dict[str, Variant]:
    """{op, "op / peer" or "dW": call on operand set i} of the peers that are chosen."""
    ranges = [[i * problem.length, (i + 1) * problem.length] for i in range(problem.sequences)]
    spans = torch.tensor(ranges, dtype=torch.int32)
    axis, unit = problem.shape.axis, problem.shape.unit_size

    def ours(name: str, backend: str | None = None) -> Variant:
        def call(index: int) -> object:
            with K.use_backend(backend):
                return getattr(K, name)(*sets[index], spans, axis=axis, unit_size=unit)

        return call

    def peer(form: Callable[..., Tensor], **inner: str) -> Variant:
        return lambda index: form(
            *sets[index],
            problem.sequences,
            axis,
            unit,
            **{key: eager_forms.compiled(name) for key, name in inner.items()},
        )

    forms, reduce = eager_forms, "reduce_product"
    found = {
        "weight_salience / eager": peer(forms.whole_salience),
        "weight_salience / tiled": peer(forms.tiled_salience if on_gpu else forms.reference_salience),
        "weight_salience / compiled": peer(forms.whole_salience, reduce=reduce),
        "weight_salience / compiled tiled": peer(forms.tiled_salience, reduce=reduce),
        "weight_salience / cuda": ours("weight_salience", "cuda"),
        "coupled_salience / eager": peer(forms.coupled),
        "coupled_salience / compiled": peer(forms.coupled, add="add_product", orders="coupled_orders"),
        "coupled_salience / cuda": ours("coupled_salience", "cuda"),
    }
    found = {name: call for name, call in found.items() if name.split(" / ")[1] in chosen}
    if "dW" in chosen:
        found["dW"] = lambda index: sets[index][1].T @ sets[index][0]
    return {op: ours(op) for op in OPS} | found


def weight_rows(problem: Problem, rates: Rates, repeats: int, chosen: Sequence[str], on_gpu: bool) -> Iterator[Row]:
    """Time, peak memory above the operands, rates and ratios of both ops on one shape."""
    sets = operands(problem, rates)
    variants = variants_of(problem, sets, chosen, on_gpu)
    seconds = interleave(variants, repeats, len(sets), rates.device)
    memory = peaks(variants, rates.device)
    for op in OPS:
        yield from rows_of(op, problem, rates, seconds, memory, on_gpu)


def rows_of(
    op: str, problem: Problem, rates: Rates, seconds: Mapping[str, float], memory: Mapping[str, float], on_gpu: bool
) -> Iterator[Row]:
    """Rows of one op from seconds and bytes by variant (``variants_of``), measured or predicted."""
    case, mine = f"{op} {problem.case}", seconds[op]
    floor = rates.floor(problem.flops, problem.elements * rates.dtype.itemsize)
    yield Row.single(f"{case}, arithmetic", problem.flops / mine / 1e12, "TFLOP/s")
    yield Row.single(f"{case}, share of roofline", floor / mine, "share")
    yield Row.single(f"{case}, peak memory", memory[op] / 2**20, "MiB")
    for peer in PEERS:
        name = peer if peer == "dW" else f"{op} / {peer}"
        if name not in seconds:
            continue
        limit = (ASKED_LONG if problem.length >= LONG else ASKED_SHORT).get(f"{op} / {peer}")
        asked = f"<= {limit:.2f}" if on_gpu and limit else ""
        yield Row.compare(f"{case} / {peer}", mine * 1e3, seconds[name] * 1e3, "ms", asked)
        yield Row.single(f"{case}: {peer}, peak memory", memory[name] / 2**20, "MiB")
