"""Importance criteria: functions from Statistics to Scores (method section 2)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saap.statistics import ORDERS, ModuleStatistics, Statistics
from saap.units import MODULES, Units

AGGREGATIONS = ("joint", "sum", "prod", "max", "last")
FUSIONS = ("uncertainty", "mean", "vector", "element")


@dataclass(frozen=True)
class Scores:
    """One importance per unit, (U,) float64 per module, layers one after another; lowest goes first."""

    units: Units
    attention: Tensor
    mlp: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for module in MODULES:
            values = getattr(self, module)
            wanted = (self.units.count(module),)
            if tuple(values.shape) != wanted:
                raise ValueError(f"expected {module} scores of shape {wanted}, got {tuple(values.shape)}")
            if not torch.isfinite(values).all():
                raise ValueError(f"expected finite {module} scores, found NaN or inf")

    def layer(self, index: int, module: str) -> Tensor:
        """The scores of one layer's units, (U_l,)."""
        offsets = self.units.offsets(module)
        return getattr(self, module)[offsets[index] : offsets[index + 1]]


Criterion = Callable[..., Scores]


def score(stats: Statistics, criterion: str | Criterion = "saap", **options: Any) -> Scores:
    """Score every unit with a criterion named in ``CRITERIA`` or with your own callable.

    ``options`` go to the criterion. A callable receives the Statistics and returns Scores. Raises
    ValueError for unknown names and for results that are not one finite score per unit.
    """
    if stats.sequences < 1:
        raise ValueError("expected statistics of at least one sequence, got none")
    if callable(criterion):
        scores = criterion(stats, **options)
        if not isinstance(scores, Scores):
            raise ValueError(f"expected the criterion to return Scores, got {type(scores).__name__}")
        return scores
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}")
    return CRITERIA[criterion](stats, **options)


def saap(
    stats: Statistics,
    *,
    vector_order: str = "second",
    element_order: str = "first",
    aggregation: str = "sum",
    fusion: str = "uncertainty",
) -> Scores:
    """Vector-wise and element-wise importance fused by homoscedastic uncertainty (SAAP as reconstructed).

    I = IV / (2 s1^2) + IE / (2 s2^2) with s1, s2 fitted in closed form, s_m^2 = mean of I_m over all
    units: each importance is divided by twice its own mean. ``fusion`` "mean" adds them unscaled.
    Source: method section 2b, after arXiv 2412.15127.
    """
    _check_option("fusion", fusion, FUSIONS)
    vector = _importance(stats, "vector", vector_order, aggregation)
    element = _importance(stats, "element", element_order, aggregation)
    if fusion == "uncertainty":
        fused = [v / _twice_mean(vector) + e / _twice_mean(element) for v, e in zip(vector, element, strict=True)]
    elif fusion == "mean":
        fused = [(v + e) / 2 for v, e in zip(vector, element, strict=True)]
    else:
        fused = vector if fusion == "vector" else element
    settings = {
        "criterion": "saap",
        "vector_order": vector_order,
        "element_order": element_order,
        "aggregation": aggregation,
        "fusion": fusion,
    }
    return _scores(stats, fused, settings)


def vector(stats: Statistics, *, order: str = "first", aggregation: str = "sum") -> Scores:
    """Vector-wise Taylor importance: |a|, a^2 or |a - a^2/2| of the signed sum a per sequence (section 2a)."""
    settings = {"criterion": "vector", "order": order, "aggregation": aggregation}
    return _scores(stats, _importance(stats, "vector", order, aggregation), settings)


def element(stats: Statistics, *, order: str = "first", aggregation: str = "sum", coupled: bool = False) -> Scores:
    """Element-wise Taylor importance: the sum over weights of |s|, s^2 or |s - s^2/2| (section 2a).

    ``coupled`` takes absolute values after the mean over sequences, as LLM-Pruner does; it needs statistics
    collected with ``coupled=True``.
    """
    settings = {"criterion": "element", "order": order, "aggregation": aggregation}
    if coupled:
        return _scores(stats, _coupled_importance(stats, order, aggregation), settings | {"coupled": True})
    return _scores(stats, _importance(stats, "element", order, aggregation), settings)


def mask_gradient(stats: Statistics, *, order: str = "second") -> Scores:
    """Gradient of the unit's mask: squared ("second", its Fisher information), absolute ("first") or "mixed"."""
    settings = {"criterion": "mask_gradient", "order": order}
    return _scores(stats, _importance(stats, "vector", order, "last"), settings)


def magnitude(stats: Statistics, *, norm: str = "l2") -> Scores:
    """Size of the unit's weights: L2 norm ("l2") or sum of absolute values ("l1"); uses no data."""
    _check_option("norm", norm, ("l1", "l2"))
    modules = [stats.modules[name] for name in MODULES]
    if norm == "l1":
        values = [module.weight_l1.sum(0) for module in modules]
    else:
        values = [module.weight_square.sum(0).sqrt() for module in modules]
    return _scores(stats, values, {"criterion": "magnitude", "norm": norm})


def random(stats: Statistics, *, seed: int = 0) -> Scores:
    """Independent uniform scores: the baseline that every criterion must beat.

    A unit's score is proportional to its parameters, so that global rankings per removed
    parameter pick attention and MLP units alike.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for module in MODULES:
        cost = torch.tensor(
            [layer.unit_parameters(module) for layer in stats.units.layers for _ in range(layer.count(module))],
            dtype=torch.float64,
        )
        values.append(torch.rand(len(cost), generator=generator, dtype=torch.float64) * cost)
    return _scores(stats, values, {"criterion": "random", "seed": seed})


CRITERIA: dict[str, Criterion] = {
    "saap": saap,
    "vector": vector,
    "element": element,
    "mask_gradient": mask_gradient,
    "magnitude": magnitude,
    "random": random,
}


def _scores(stats: Statistics, values: list[Tensor], settings: dict[str, Any]) -> Scores:
    attention, mlp = values
    return Scores(stats.units, attention, mlp, settings)


def _importance(stats: Statistics, kind: str, order: str, aggregation: str) -> list[Tensor]:
    """Mean over sequences of one importance, aggregated over the coupled matrices: [(U,)] per module."""
    _check_option("order", order, ORDERS)
    _check_option("aggregation", aggregation, AGGREGATIONS)
    return [_aggregate(stats.modules[name], kind, ORDERS.index(order), aggregation) for name in MODULES]


def _aggregate(module: ModuleStatistics, kind: str, order: int, aggregation: str) -> Tensor:
    values: Tensor = getattr(module.salience, f"{kind}_mean")[order]  # [P, U]
    matrices = values[: len(module.matrices)]
    if aggregation == "last":
        return matrices[-1]
    if aggregation == "prod":
        return matrices.prod(0)
    if aggregation == "max":
        return matrices.amax(0)
    return values[module.rows.index(aggregation)]


def _coupled_importance(stats: Statistics, order: str, aggregation: str) -> list[Tensor]:
    _check_option("order", order, ORDERS)
    reduce = {
        "sum": lambda m: m.sum(0),
        "prod": lambda m: m.prod(0),
        "max": lambda m: m.amax(0),
        "last": lambda m: m[-1],
    }
    _check_option("aggregation", aggregation, tuple(reduce))
    values = [stats.modules[name].coupled for name in MODULES]
    if any(value is None for value in values):
        raise ValueError("expected statistics with coupled salience, got none; collect them with coupled=True")
    return [reduce[aggregation](value[ORDERS.index(order)]) for value in values if value is not None]


def _twice_mean(importance: list[Tensor]) -> Tensor:
    mean = torch.cat(importance).mean()
    return 2 * mean if mean > 0 else torch.ones_like(mean)  # all-zero importance carries no ranking


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
