"""MLP widths as plans leave them, for benchmarks.compact_gemm: whatever the scores say, odd ones included."""

from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.shapes import MODELS
from saap.scores import Scores
from saap.search import search
from saap.units import LayerUnits, Units

LAYERS = {"Llama-2-7B": 32, "Llama-3-8B": 32, "Qwen2.5-7B": 28}
RATIOS = (0.2, 0.5)  # of the MLPs' parameters that go
RESIDUES = 16


@dataclass(frozen=True)
class Mlp:
    """A gated MLP of hidden size D and the width F that is left of it."""

    name: str
    hidden: int
    width: int

    @property
    def case(self) -> str:
        return f"{self.name} {self.hidden}x{self.width}"


def units_of(model: str) -> Units:
    """The units of a model of benchmarks.shapes; embeddings are left out, nothing here counts them."""
    q, k, _, gate, _ = MODELS[model]
    layer = LayerUnits(q.columns, q.rows // k.unit_size, k.rows // k.unit_size, k.unit_size, gate.rows, gated=True)
    blocks = LAYERS[model] * (layer.parameters("attention") + layer.parameters("mlp"))
    return Units("llama", (layer,) * LAYERS[model], blocks, blocks, "0" * 16)


@cache
def plan_widths(model: str, ratio: float) -> tuple[int, ...]:
    """Widths of the layers after a global search takes ``ratio`` of the MLPs' parameters, any width allowed.

    The scores are drawn, log-normal like those of models, and grow with depth to twice those of the first layer.
    """
    units = units_of(model)
    drawn = torch.randn(units.count("mlp"), generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    depth = torch.linspace(1, 2, len(units.layers), dtype=torch.float64)
    scores = Scores(
        units,
        torch.ones(units.count("attention"), dtype=torch.float64),
        (drawn.view(len(depth), -1) * depth[:, None]).flatten(),
    )
    removed = ratio * sum(layer.parameters("mlp") for layer in units.layers)
    plan = search(scores, budget=units.total_parameters - removed, multiple=1, modules=("mlp",))
    return tuple(layer.width for layer in plan.layers)


def typical(model: str, ratio: float) -> Mlp:
    """The odd width in the middle of a plan's."""
    odd = sorted(width for width in plan_widths(model, ratio) if width % 2)
    return Mlp(f"{model} -{ratio:.0%}", MODELS[model][0].columns, odd[len(odd) // 2])


def every_residue(model: str) -> list[Mlp]:
    """A width of the model's plans for every remainder mod 16, ascending: those of the first plan where it has one."""
    found: dict[int, int] = {}
    for ratio in (RATIOS[0], *(RATIOS[0] + step / 50 for step in range(1, 10))):
        for width in plan_widths(model, ratio) if len(found) < RESIDUES else ():
            found.setdefault(width % RESIDUES, width)
    return [Mlp(model, MODELS[model][0].columns, width) for width in sorted(found.values())]
