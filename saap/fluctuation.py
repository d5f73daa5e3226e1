"""How much a unit's importance varies from one calibration sequence to the next (method section 2c)."""

from typing import Any

import torch
from torch import Tensor

from saap.statistics import ORDERS, ModuleStatistics, Statistics

FALLBACK = {"criterion": "element", "order": "first", "aggregation": "sum"}


def fluctuation(statistics: Statistics, settings: dict[str, Any]) -> tuple[dict[str, Tensor], str] | None:
    """f[u] = std_n I_n[u] / mean_n I_n[u] of a criterion's importance: {module: (U,)}, and what it is of.

    ``settings`` are those of the Scores or the Plan. Vector-wise, element-wise and mask-gradient criteria are
    computed from the moments of their own importance. The fused criterion adds an IV and an IE; where the two
    are of different orders their covariance was not measured, and the standard deviations are added: an upper
    bound, reached when both rise and fall together. A criterion without an importance per sequence gets the
    fluctuation of the element-wise first order instead. Units whose mean is zero get zero. None for fewer than
    two sequences, which have no spread.
    """
    if statistics.sequences < 2:
        return None
    terms = _terms(settings)
    if terms is None:
        settings, terms = FALLBACK, _terms(FALLBACK)
    assert terms is not None  # the fallback has terms
    found = {}
    scales = [_mean_over_modules(statistics, *term) if len(terms) > 1 else 1.0 for term in terms]
    if settings.get("fusion") == "mean":
        scales = [1.0, 1.0]
    for name, module in statistics.modules.items():
        mean, std = _combined(module, terms, scales, statistics.sequences)
        found[name] = torch.where(mean > 0, std / mean.where(mean > 0, torch.ones_like(mean)), torch.zeros_like(mean))
    return found, str(settings["criterion"])


Term = tuple[str, str, str]  # kind ("vector" | "element"), order, aggregation


def _terms(settings: dict[str, Any]) -> list[Term] | None:
    """The importances that a criterion adds up; None when it has no moments over sequences."""
    name, aggregation = settings.get("criterion"), settings.get("aggregation", "sum")
    if aggregation not in ("joint", "sum", "last") or settings.get("coupled"):
        return None
    if name == "saap":
        both = [(kind, settings[f"{kind}_order"], aggregation) for kind in ("vector", "element")]
        return [term for term in both if settings["fusion"] in ("uncertainty", "mean", term[0])]
    if name in ("vector", "element"):
        return [(name, settings["order"], aggregation)]
    if name == "mask_gradient":
        return [("vector", settings["order"], "last")]
    return None


def _row(module: ModuleStatistics, values: Tensor, order: str, aggregation: str) -> Tensor:
    row = len(module.matrices) - 1 if aggregation == "last" else module.rows.index(aggregation)
    return values[ORDERS.index(order), row]  # [U]


def _mean_over_modules(statistics: Statistics, kind: str, order: str, aggregation: str) -> float:
    """The mean importance over all units, by which the fused criterion divides it."""
    values = [_row(m, getattr(m.salience, f"{kind}_mean"), order, aggregation) for m in statistics.modules.values()]
    return float(torch.cat(values).mean()) or 1.0


def _combined(module: ModuleStatistics, terms: list[Term], scales: list[float], count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over sequences of the sum of terms, each divided by its scale; (U,) both."""
    means, deviations = [], []
    for (kind, order, aggregation), scale in zip(terms, scales, strict=True):
        means.append(_row(module, getattr(module.salience, f"{kind}_mean"), order, aggregation) / scale)
        m2 = _row(module, getattr(module.salience, f"{kind}_m2"), order, aggregation)
        deviations.append((m2 / (count - 1)).clamp_min(0).sqrt() / scale)
    if len(terms) == 1 or terms[0][1] != terms[1][1]:
        return torch.stack(means).sum(0), torch.stack(deviations).sum(0)
    cross = _row(module, module.salience.cross, *terms[0][1:]) / (count - 1) / (scales[0] * scales[1])
    variance = deviations[0].square() + deviations[1].square() + 2 * cross
    return means[0] + means[1], variance.clamp_min(0).sqrt()
