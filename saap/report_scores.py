"""Importance and fluctuation of a plan's units, thinned out to what a chart can show."""

import torch
from torch import Tensor
from torch.nn import functional as F

from saap.charts import HeatRows, Point
from saap.plan import Plan
from saap.report_data import ModuleScores
from saap.scores import Scores
from saap.units import MODULES

BINS = 64  # columns of a heat map
POINTS = 1500  # per module
NAMES = {"attention": "KV heads", "mlp": "MLP channels"}


def module_scores(plan: Plan, scores: Scores) -> list[ModuleScores]:
    """What the charts of scores show for each module that has units; no points without a fluctuation."""
    varied = scores.fluctuation
    found = []
    for module in MODULES:
        if not plan.units.count(module):
            continue
        kept = _kept(plan, module)
        values = getattr(scores, module)
        points = [] if varied is None else _points(values, varied[module], kept)
        found.append(ModuleScores(NAMES[module], _heat(plan, scores, module, kept), points, len(values)))
    return found


def _kept(plan: Plan, module: str) -> Tensor:
    """Whether each unit stays, (U,) bool, layers one after another."""
    kept = torch.zeros(plan.units.count(module), dtype=torch.bool)
    for start, layer in zip(plan.units.offsets(module), plan.layers, strict=False):
        indices = layer.kv_heads if module == "attention" else layer.channels
        kept[start + torch.tensor(indices, dtype=torch.long)] = True
    return kept


def _points(values: Tensor, varied: Tensor, kept: Tensor) -> list[Point]:
    """Evenly spaced units over all layers: the same ones for the same model."""
    chosen = torch.linspace(0, len(values) - 1, min(POINTS, len(values)), dtype=torch.float64).round().long()
    columns = (values[chosen].tolist(), varied[chosen].tolist(), kept[chosen].tolist())
    return [(_short(x), _short(y), stays) for x, y, stays in zip(*columns, strict=True)]


def _heat(plan: Plan, scores: Scores, module: str, kept: Tensor) -> HeatRows:
    """Heads one by one in their order; channels, and more heads than bins, sorted by importance and binned."""
    offsets = plan.units.offsets(module)
    layers = [scores.layer(index, module) for index in range(len(plan.layers))]
    stays = [kept[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
    if module == "attention" and max(map(len, layers)) <= BINS:
        gone = [torch.nonzero(~mask).flatten().tolist() for mask in stays]
        return HeatRows([[_short(value) for value in values.tolist()] for values in layers], removed=gone)
    rows = [_binned(values) for values in layers]
    lowest_go = all(_lowest_go(values, mask) for values, mask in zip(layers, stays, strict=True))
    cuts = [float((~mask).double().mean()) if len(mask) else 0.0 for mask in stays]
    return HeatRows(rows, cuts=cuts if lowest_go else [])


def _lowest_go(values: Tensor, kept: Tensor) -> bool:
    """Whether every removed unit scores at most as high as every kept one."""
    return bool(kept.all() or not kept.any() or values[~kept].max() <= values[kept].min())


def _binned(values: Tensor) -> list[float]:
    """Means of at most ``BINS`` equal parts of the sorted values."""
    if not len(values):
        return []
    parts = F.adaptive_avg_pool1d(values.sort().values[None], min(BINS, len(values)))[0]
    return [_short(value) for value in parts.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
