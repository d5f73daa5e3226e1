"""Rows of the memory-bound activation ops, for benchmarks.calibration_kernels."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

import saap_kernels as K
from benchmarks import eager_forms
from benchmarks.common import Row
from benchmarks.timing import Rates, Variant, interleave, peaks

OPERANDS = {"activation_salience": 2, "activation_statistics": 1, "activation_salience_statistics": 2}
FORMS = {  # the first form that comes to mind, and the strongest
    "activation_salience": ("salience", "mask_gradients"),
    "activation_statistics": ("statistics", "statistics_by_norms"),
    "activation_salience_statistics": ("salience_statistics", "strongest_salience_statistics"),
}
PEERS = ("eager", "strongest eager", "compiled", "cuda")


def default_peers(on_gpu: bool, quick: bool) -> tuple[str, ...]:
    return tuple(name for name in PEERS if not (quick and name == "compiled") and (name != "cuda" or on_gpu))


def activation_rows(
    op: str, extent: tuple[int, int, int], rates: Rates, repeats: int, chosen: Sequence[str], on_gpu: bool
) -> Iterator[Row]:
    """One op on (tokens, features, tokens of a sequence): rates, time against peers, memory above the operands."""
    sets = operands(op, extent, rates)
    device, length = rates.device, extent[2]
    variants = variants_of(op, sets, length, chosen)
    seconds, memory = interleave(variants, repeats, len(sets), device), peaks(variants, device)
    yield from rows_of(op, extent, rates, seconds, memory, on_gpu)


def rows_of(
    op: str, extent: tuple[int, int, int], rates: Rates, seconds: Mapping[str, float], memory: Mapping[str, float],
    on_gpu: bool,
) -> Iterator[Row]:  # fmt: skip
    """Rows of one op from seconds and bytes by variant, measured or predicted."""
    tokens, features, length = extent
    size = OPERANDS[op] * tokens * features * rates.dtype.itemsize
    case = f"{op} {tokens}x{features}, sequences of {length}"
    yield Row.single(f"{case}, reading", size / seconds["ours"] / 1e9, "GB/s")
    share = size / seconds["ours"] / rates.read_bytes
    yield Row.single(f"{case}, share of read bandwidth", share, "share", ">= 0.9" if on_gpu else "")
    yield Row.single(f"{case}, peak memory", memory["ours"] / 2**20, "MiB")
    for peer in PEERS:
        if peer in seconds:
            yield Row.compare(f"{case} / {peer}", seconds["ours"] * 1e3, seconds[peer] * 1e3, "ms")
            yield Row.single(f"{case}: {peer}, peak memory", memory[peer] / 2**20, "MiB")


def operands(op: str, extent: tuple[int, int, int], rates: Rates) -> list[tuple[torch.Tensor, ...]]:
    """Two sets of what the op reads, drawn on the device."""
    tokens, features, _ = extent
    generator = torch.Generator(rates.device).manual_seed(0)
    return [
        tuple(
            torch.randn(tokens, features, generator=generator, device=rates.device, dtype=rates.dtype)
            for _ in range(OPERANDS[op])
        )
        for _ in range(2)
    ]


def variants_of(
    op: str, sets: list[tuple[torch.Tensor, ...]], length: int, chosen: Sequence[str]
) -> dict[str, Variant]:
    """{"ours" or peer: call on operand set i} of the peers that are chosen."""
    tokens = len(sets[0][0])
    spans = torch.tensor([[i, i + length] for i in range(0, tokens, length)], dtype=torch.int32)

    def ours(backend: str | None = None) -> Variant:
        def call(index: int) -> object:
            with K.use_backend(backend):
                return getattr(K, op)(*sets[index], spans)

        return call

    def peer(form: Callable[[], Callable[..., object]]) -> Variant:
        return lambda index: form()(*sets[index], tokens // length)

    first, strongest = FORMS[op]
    found = {
        "eager": peer(lambda: getattr(eager_forms, first)),
        "strongest eager": peer(lambda: getattr(eager_forms, strongest)),
        "compiled": peer(lambda: eager_forms.compiled(first)),
        "cuda": ours("cuda"),
    }
    return {"ours": ours()} | {name: call for name, call in found.items() if name in chosen}
