"""Scores of different modules brought to one scale before they are ranked together (method section 2c)."""

import torch
from torch import Tensor

from saap.scores import Scores
from saap.units import MODULES


def within_layers(scores: Scores) -> Scores:
    """Each unit's z-score among its layer's units of its module: FLAP's standardisation (arXiv 2312.11983)."""
    layers = range(len(scores.units.layers))
    values = [torch.cat([_z(scores.layer(index, module)) for index in layers]) for module in MODULES]
    return Scores.of(scores.units, values, scores.settings)


def with_fluctuation(scores: Scores, weight: float) -> Scores:
    """z(I) - weight * z(f), z per module over all layers: stable and important units stay for a positive weight.

    Raises ValueError for criteria whose importance has no value per sequence.
    """
    if scores.fluctuation is None:
        name = scores.settings.get("criterion", "this criterion")
        raise ValueError(f"method 'fluctuation' needs a criterion with an importance per sequence, {name} has none")
    values = [_z(getattr(scores, module)) - weight * _z(scores.fluctuation[module]) for module in MODULES]
    return Scores.of(scores.units, values, scores.settings)


def _z(values: Tensor) -> Tensor:
    """(U,) -> (U,) with mean 0 and standard deviation 1; zeros where all are equal."""
    deviation = values.std(correction=0) if len(values) else values.new_zeros(())
    return (values - values.mean()) / deviation if deviation > 0 else torch.zeros_like(values)
