"""Projection shapes of the models that people prune, and the token counts of calibration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """One Linear (rows, columns) and how its units lie in it."""

    name: str
    rows: int
    columns: int
    axis: str
    unit_size: int


def projections(name: str, hidden: int, query: int, kv: int, head_dim: int, width: int) -> tuple[Projection, ...]:
    """q, k (as v), o, gate (as up) and down of one layer."""
    group = query // kv * head_dim
    return (
        Projection(f"{name} q", query * head_dim, hidden, "out", group),
        Projection(f"{name} k", kv * head_dim, hidden, "out", head_dim),
        Projection(f"{name} o", hidden, query * head_dim, "in", group),
        Projection(f"{name} gate", width, hidden, "out", 1),
        Projection(f"{name} down", hidden, width, "in", 1),
    )


MODELS = {
    "Llama-2-7B": projections("Llama-2-7B", 4096, 32, 32, 128, 11008),
    "Llama-2-13B": projections("Llama-2-13B", 5120, 40, 40, 128, 13824),
    "Llama-3-8B": projections("Llama-3-8B", 4096, 32, 8, 128, 14336),
    "Qwen2.5-7B": projections("Qwen2.5-7B", 3584, 28, 4, 128, 18944),
    "Qwen2.5-72B": projections("Qwen2.5-72B", 8192, 64, 8, 128, 29568),
}
TOKENS = ((10, 64), (16, 2048), (128, 128))  # sequences x length; the first two are those that bounds are asked for
