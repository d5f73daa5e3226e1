"""Importance criteria: functions from Statistics to Scores (method section 2)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saap import baselines
from saap.scores import Scores, check_option
from saap.statistics import COUPLED, ORDERS, ModuleStatistics, Statistics
from saap.units import MODULES

AGGREGATIONS = ("joint", "sum", "prod", "max", "last")
FUSIONS = ("uncertainty", "mean", "vector", "element")
NO_COUPLED = (
    "expected statistics with coupled salience, got none; collect them with coupled=True (saap calibrate --coupled)"
)

Criterion = Callable[..., Scores]


def score(stats: Statistics, criterion: str | Criterion = "saap", **options: Any) -> Scores:
    """Score every unit with a criterion named in ``CRITERIA`` or with your own callable.

    ``options`` go to the criterion. A callable receives the Statistics and returns Scores. Raises
    ValueError for unknown names and for results that are not one finite score per unit.
    """
    if stats.sequences < 1:
        raise ValueError("expected statistics of at least one sequence, got none")
    check_criterion(criterion)
    if callable(criterion):
        scores = criterion(stats, **options)
        if not isinstance(scores, Scores):
            raise ValueError(f"expected the criterion to return Scores, got {type(scores).__name__}")
    else:
        scores = CRITERIA[criterion](stats, **options)
    return replace(scores, experts=stats.experts[0]) if stats.experts.numel() else scores


def saap(
    stats: Statistics,
    *,
    vector_order: str = "second",
    element_order: str = "second",
    aggregation: str = "last",
    fusion: str = "uncertainty",
) -> Scores:
    """Vector-wise and element-wise importance fused by homoscedastic uncertainty (SAAP as reconstructed).

    I = IV / (2 s1^2) + IE / (2 s2^2) with s1, s2 fitted in closed form, s_m^2 = mean of I_m over all
    units: each importance is divided by twice its own mean. ``fusion`` "mean" takes half of each.
    Source: method section 2b, after arXiv 2412.15127.
    """
    check_option("fusion", fusion, FUSIONS)
    settings = {
        "criterion": "saap",
        "vector_order": vector_order,
        "element_order": element_order,
        "aggregation": aggregation,
        "fusion": fusion,
    }
    shares = {"uncertainty": (1.0, 1.0), "mean": (0.5, 0.5), "vector": (1.0, 0.0), "element": (0.0, 1.0)}[fusion]
    if fusion == "uncertainty":
        vector = _importance(stats, "vector", vector_order, aggregation)
        element = _importance(stats, "element", element_order, aggregation)
        shares = 1 / _twice_mean(vector), 1 / _twice_mean(element)
    return _scores(stats, shares, (vector_order, element_order), aggregation, settings)


def vector(stats: Statistics, *, order: str = "first", aggregation: str = "sum", coupled: bool = False) -> Scores:
    """Vector-wise Taylor importance: |a|, a^2 or |a - a^2/2| of every row's or column's signed sum a per sequence.

    Summed over the unit's rows or columns; with ``aggregation`` "joint" a is of the whole unit (section 2a).
    ``coupled`` takes the absolute value after the mean over sequences, as LLM-Pruner's "vectorize" does, which
    is of first order; it needs statistics collected with ``coupled=True``.
    """
    settings = {"criterion": "vector", "order": order, "aggregation": aggregation}
    if coupled:
        check_option("order", order, ("first",))
        values = _coupled(stats, "vector")
        return Scores.of(stats.units, _reduced(values, aggregation), settings | {"coupled": True})
    return _scores(stats, (1.0, 0.0), (order, order), aggregation, settings)


def element(stats: Statistics, *, order: str = "first", aggregation: str = "sum", coupled: bool = False) -> Scores:
    """Element-wise Taylor importance: the sum over weights of |s|, s^2 or |s - s^2/2| (section 2a).

    ``coupled`` takes absolute values after the mean over sequences, as LLM-Pruner does; it needs statistics
    collected with ``coupled=True``.
    """
    settings = {"criterion": "element", "order": order, "aggregation": aggregation}
    if coupled:
        check_option("order", order, ORDERS)
        values = _coupled(stats, order)
        return Scores.of(stats.units, _reduced(values, aggregation), settings | {"coupled": True})
    return _scores(stats, (0.0, 1.0), (order, order), aggregation, settings)


def mask_gradient(stats: Statistics, *, order: str = "second") -> Scores:
    """Gradient of the unit's mask: squared ("second", its Fisher information), absolute ("first") or "mixed"."""
    settings = {"criterion": "mask_gradient", "order": order}
    return _scores(stats, (1.0, 0.0), (order, order), "mask", settings)


def llm_pruner(stats: Statistics, *, aggregation: str = "sum") -> Scores:
    """LLM-Pruner's ``--taylor param_first``: |mean over sequences of s|, summed over the unit's weights.

    ``element`` of first order on coupled statistics. Source: Ma et al., arXiv 2305.11627; ``aggregation`` is its
    ``--grouping_strategy``. LLM-Pruner ranks within each layer: ``search(..., method="uniform")`` is nearest.
    """
    return _named("llm_pruner", element(stats, coupled=True, aggregation=aggregation))


def llm_pruner_second(stats: Statistics, *, aggregation: str = "sum") -> Scores:
    """LLM-Pruner's ``--taylor param_second``: the mean over sequences of s^2, summed over the unit's weights.

    Squares are their own absolute values, so any statistics hold it: this is ``element`` of second order.
    """
    return _named("llm_pruner_second", element(stats, order="second", aggregation=aggregation))


def llm_pruner_mixed(stats: Statistics, *, aggregation: str = "sum") -> Scores:
    """LLM-Pruner's ``--taylor param_mix``: |mean of s - mean of s^2 / 2| over sequences, summed over the weights.

    ``element`` of mixed order on coupled statistics.
    """
    return _named("llm_pruner_mixed", element(stats, order="mixed", coupled=True, aggregation=aggregation))


def llm_pruner_vector(stats: Statistics, *, aggregation: str = "sum") -> Scores:
    """LLM-Pruner's ``--taylor vectorize``: |mean over sequences of a| of every row or column, summed over the unit.

    ``vector`` on coupled statistics.
    """
    return _named("llm_pruner_vector", vector(stats, coupled=True, aggregation=aggregation))


CRITERIA: dict[str, Criterion] = {
    "saap": saap,
    "vector": vector,
    "element": element,
    "mask_gradient": mask_gradient,
    "flap": baselines.flap,
    "wanda_sp": baselines.wanda_sp,
    "activation": baselines.activation,
    "block_influence": baselines.block_influence,
    "llm_pruner": llm_pruner,
    "llm_pruner_second": llm_pruner_second,
    "llm_pruner_mixed": llm_pruner_mixed,
    "llm_pruner_vector": llm_pruner_vector,
    "magnitude": baselines.magnitude,
    "random": baselines.random,
}


# their importances fluctuate over sequences
PER_SEQUENCE = ("saap", "vector", "element", "mask_gradient", "llm_pruner_second")
NEED_COUPLED = ("llm_pruner", "llm_pruner_mixed", "llm_pruner_vector")


def check_criterion(criterion: str | Criterion, method: str = "global") -> None:
    """Raise ValueError for a name that is no criterion, or whose scores the search method cannot rank."""
    if callable(criterion):
        return
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}")
    if method == "fluctuation" and criterion not in PER_SEQUENCE:
        raise ValueError(
            f"method 'fluctuation' needs a criterion with an importance per sequence, {criterion} has none"
        )


def needs_coupled(*criteria: str | Criterion) -> bool:
    """Whether a named one of ``criteria`` reads coupled statistics (``calibrate(coupled=True)``)."""
    return any(isinstance(criterion, str) and criterion in NEED_COUPLED for criterion in criteria)


def check_statistics(stats: Statistics, *criteria: str | Criterion) -> None:
    """Raise ValueError when a named one of ``criteria`` reads coupled statistics and ``stats`` have none."""
    for criterion in criteria:
        if needs_coupled(criterion) and not stats.coupled:
            raise ValueError(f"criterion {criterion!r}: {NO_COUPLED}")


def _named(name: str, scores: Scores) -> Scores:
    return replace(scores, settings=scores.settings | {"criterion": name})


def _scores(
    stats: Statistics, shares: tuple[float, float], orders: tuple[str, str], aggregation: str, settings: dict[str, Any]
) -> Scores:
    """shares[0] * IV + shares[1] * IE of two orders, with its fluctuation over sequences where it has one."""
    alpha, beta = shares
    vector = _importance(stats, "vector", orders[0], aggregation)
    element = _importance(stats, "element", orders[1], aggregation)
    values = [alpha * v + beta * e for v, e in zip(vector, element, strict=True)]
    fluctuation = None
    if aggregation in ("joint", "sum", "last", "mask"):
        index = ORDERS.index(orders[0]), ORDERS.index(orders[1])
        fluctuation = {
            name: _deviation(stats.modules[name], shares, index, aggregation) / (value + torch.finfo(value.dtype).tiny)
            for name, value in zip(MODULES, values, strict=True)
        }
    return Scores.of(stats.units, values, settings, fluctuation)


def _deviation(
    module: ModuleStatistics, shares: tuple[float, float], orders: tuple[int, int], aggregation: str
) -> Tensor:
    """Standard deviation over sequences of shares[0] * IV + shares[1] * IE, (U,); 0 for a single sequence."""
    (alpha, beta), (i, j), moments = shares, orders, module.salience
    row = len(module.matrices) - 1 if aggregation == "last" else module.rows.index(aggregation)
    squares = alpha**2 * moments.vector_m2[i, row] + beta**2 * moments.element_m2[j, row]
    squares = squares + 2 * alpha * beta * moments.cross[i, j, row]
    return (squares.clamp_min(0) / max(1, moments.count - 1)).sqrt()  # rounding may leave it below 0


def _importance(stats: Statistics, kind: str, order: str, aggregation: str) -> list[Tensor]:
    """Mean over sequences of one importance, aggregated over the coupled matrices: [(U,)] per module."""
    check_option("order", order, ORDERS)
    check_option("aggregation", aggregation, AGGREGATIONS if aggregation != "mask" else ("mask",))
    found = []
    for name in MODULES:
        module = stats.modules[name]
        rows: Tensor = getattr(module.salience, f"{kind}_mean")[ORDERS.index(order)]  # [P, U]
        if aggregation in module.rows:
            found.append(rows[module.rows.index(aggregation)])
        else:
            found += _reduced([rows[: len(module.matrices)]], aggregation)
    return found


def _coupled(stats: Statistics, kind: str) -> list[Tensor]:
    """[(M, U)] per module of one kind of coupled salience."""
    found = [stats.modules[name].coupled for name in MODULES]
    if any(value is None for value in found):
        raise ValueError(NO_COUPLED)
    return [value[COUPLED.index(kind)] for value in found if value is not None]


def _reduced(values: list[Tensor], aggregation: str) -> list[Tensor]:
    """Each (M, U) over its coupled matrices -> (U,)."""
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda m: m.sum(0),
        "prod": lambda m: m.prod(0),
        "max": lambda m: m.amax(0),
        "last": lambda m: m[-1],
    }
    check_option("aggregation", aggregation, tuple(reduce))
    return [reduce[aggregation](value) for value in values]


def _twice_mean(importance: list[Tensor]) -> float:
    mean = float(torch.cat(importance).mean())
    return 2 * mean if mean > 0 else 1.0  # all-zero importance carries no ranking
