"""Whole experts that go before the search: each layer keeps those of the highest router-weighted importance.

The importance of an expert is the mean over all tokens of g ||f(x)||_2, the router's weight times the norm of its
output, zero where the token is routed elsewhere. After REAP (Lasby et al., arXiv 2510.13999, equation 9), which takes
the mean over an expert's own tokens; ours is that times the share of tokens it gets, see ``Statistics.experts``.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from saap.plan import LayerPlan
from saap.scores import Scores
from saap.units import Units


def check_keep_experts(units: Units, keep: int, protected: Collection[int] = ()) -> None:
    """Raise ValueError unless every layer that is not ``protected`` can keep ``keep`` experts."""
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep_experts must be a positive integer; got {keep!r}")
    for index, layer in enumerate(units.layers):
        if not layer.experts:
            raise ValueError(f"keep_experts is for mixtures of experts; layer {index} of this {units.family} is dense")
        if index not in protected and not layer.experts_per_token <= keep <= layer.experts:
            raise ValueError(
                f"keep_experts must lie between the {layer.experts_per_token} experts that a token goes through and "
                f"the {layer.experts} of layer {index}; got {keep}"
            )


def kept_experts(scores: Scores, keep: int, protected: Collection[int] = ()) -> tuple[tuple[int, ...], ...]:
    """Experts that each layer keeps, ascending: the ``keep`` most important, all in ``protected`` layers.

    Raises ValueError for scores without importances of experts. Of equal ones the lower index goes.
    """
    units = scores.units
    check_keep_experts(units, keep, protected)
    if scores.experts is None:
        raise ValueError("keep_experts needs importances of experts: expected scores made by saap.score, got none")
    kept = []
    for index, importance in enumerate(scores.experts.split([layer.experts for layer in units.layers])):
        gone = 0 if index in protected else len(importance) - keep
        kept.append(tuple(importance.sort(stable=True).indices[gone:].sort().values.tolist()))
    return tuple(kept)


def without_dropped(scores: Scores, kept: tuple[tuple[int, ...], ...]) -> Scores:
    """Scores of the model that is left when every layer keeps the experts ``kept``."""
    units = scores.units
    layers = tuple(replace(layer, experts=len(own)) for layer, own in zip(units.layers, kept, strict=True))
    removed = sum(
        (old.experts - new.experts) * (old.hidden_size + old.intermediate_size * old.unit_parameters("mlp"))
        for old, new in zip(units.layers, layers, strict=True)
    )
    left = replace(
        units, layers=layers,
        total_parameters=units.total_parameters - removed, block_parameters=units.block_parameters - removed,
    )  # fmt: skip
    stays = torch.cat(
        [
            torch.isin(torch.arange(layer.experts), torch.tensor(own)).repeat_interleave(layer.intermediate_size)
            for layer, own in zip(units.layers, kept, strict=True)
        ]
    )
    fluctuation: dict[str, Tensor] | None = None
    if scores.fluctuation is not None:
        fluctuation = scores.fluctuation | {"mlp": scores.fluctuation["mlp"][stays]}
    return Scores(left, scores.attention, scores.mlp[stays], scores.settings, fluctuation)


def as_before(
    layers: tuple[LayerPlan, ...], units: Units, kept: tuple[tuple[int, ...], ...]
) -> tuple[LayerPlan, ...]:  # fmt: skip
    """Plans of the layers that are left, numbered as in ``units``, where they had all experts."""
    found = []
    for layer, sizes, own in zip(layers, units.layers, kept, strict=True):
        width = sizes.intermediate_size
        channels = tuple(own[index // width] * width + index % width for index in layer.channels)
        found.append(LayerPlan(layer.kv_heads, channels, own))
    return tuple(found)
