"""Criteria of other pruners, on the same statistics (method section "Baselines").

Each gives one score per unit; lowest goes first. Scores of attention and MLP units are comparable only as far
as their source made them so: FLAP and Wanda-sp were published with a search per layer or per module.
"""

import torch
from torch import Tensor

from saap.scores import Scores, check_option
from saap.statistics import Statistics
from saap.units import MODULES


def magnitude(stats: Statistics, *, norm: str = "l2") -> Scores:
    """Size of the unit's weights: L2 norm ("l2") or sum of absolute values ("l1"); uses no data."""
    check_option("norm", norm, ("l1", "l2"))
    modules = [stats.modules[name] for name in MODULES]
    if norm == "l1":
        values = [module.weight_l1.sum(0) for module in modules]
    else:
        values = [module.weight_square.sum(0).sqrt() for module in modules]
    return Scores.of(stats.units, values, {"criterion": "magnitude", "norm": norm})


def random(stats: Statistics, *, seed: int = 0) -> Scores:
    """Independent uniform scores: the baseline that every criterion must beat.

    A unit's score is proportional to its parameters, so that global rankings per removed
    parameter pick attention and MLP units alike.
    """
    generator = torch.Generator().manual_seed(seed)
    values = [torch.rand(len(cost), generator=generator, dtype=torch.float64) * cost for cost in unit_costs(stats)]
    return Scores.of(stats.units, values, {"criterion": "random", "seed": seed})


def wanda_sp(stats: Statistics) -> Scores:
    """Wanda-sp: |w| times the L2 norm of its input over all tokens, summed over the columns of o or down.

    Source: Sun et al., arXiv 2306.11695, in the structured form of FLAP's authors (arXiv 2312.11983).
    """
    values = []
    for name in MODULES:
        module = stats.modules[name]
        norm = (module.input_m2 + stats.tokens * module.input_mean.square()).sqrt()
        values.append(_by_unit(stats, name, module.column_l1 * norm, mean=False))
    return Scores.of(stats.units, values, {"criterion": "wanda_sp"})


def flap(stats: Statistics) -> Scores:
    """FLAP's WIFV: the variance of an input of o or down over tokens times the sum of its column's squares.

    A KV group has the mean over its query heads' features; o's values are squared as in the authors' code.
    Meant for ``search(..., method="standardised")``, and compensated by a bias. Source: An et al., arXiv 2312.11983.
    """
    values = []
    for name in MODULES:
        module = stats.modules[name]
        fluctuation = module.input_m2 / max(1, stats.tokens - 1) * module.column_square
        values.append(_by_unit(stats, name, fluctuation.square() if name == "attention" else fluctuation, mean=True))
    return Scores.of(stats.units, values, {"criterion": "flap"})


def activation(stats: Statistics) -> Scores:
    """Minitron's activation importance: L2 norm over sequences of the mean over tokens of |x|.

    x is the input of o or down; a KV group has the norm over its query heads' features.
    Source: Muralidharan et al., arXiv 2407.14679, section 2.2.
    """
    values = []
    for name in MODULES:
        module = stats.modules[name]
        values.append((_by_unit(stats, name, module.input_activity, mean=False) * stats.sequences).sqrt())
    return Scores.of(stats.units, values, {"criterion": "activation"})


def block_influence(stats: Statistics) -> Scores:
    """ShortGPT's block influence, shared out by parameters: a global search then empties layer after layer.

    BI = mean over tokens of 1 - cos(layer input, layer output). Source: Men et al., arXiv 2403.03853, equation 1.
    """
    values = [
        torch.cat([stats.influence[i].expand(layer.count(name)) for i, layer in enumerate(stats.units.layers)]) * cost
        for name, cost in zip(MODULES, unit_costs(stats), strict=True)
    ]
    return Scores.of(stats.units, values, {"criterion": "block_influence"})


def unit_costs(stats: Statistics) -> list[Tensor]:
    """Parameters of every unit, (U,) float64 per module."""
    return [
        torch.tensor(
            [layer.unit_parameters(name) for layer in stats.units.layers for _ in range(layer.count(name))],
            dtype=torch.float64,
        )
        for name in MODULES
    ]


def _by_unit(stats: Statistics, name: str, features: Tensor, *, mean: bool) -> Tensor:
    """(C,) values of input features -> (U,), summed or averaged over each unit's features."""
    bounds = stats.units.feature_offsets(name)
    parts = []
    for index, layer in enumerate(stats.units.layers):
        if not layer.count(name):
            continue
        rows = features[bounds[index] : bounds[index + 1]].view(layer.count(name), -1)  # [U_l, features per unit]
        parts.append(rows.mean(1) if mean else rows.sum(1))
    return torch.cat([features.new_zeros(0), *parts])
