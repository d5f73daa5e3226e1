"""What is left of statistics after pruning, for a later step that measures less because of it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.data import pack_for
from saap.plan import Plan
from saap.statistics import Statistics
from saap.units import IN_PARTS, Units


def left_after(statistics: Statistics, plan: Plan, units: Units) -> Statistics:
    """The statistics of what ``plan`` keeps, as if they had been measured on ``units`` of the model it leaves.

    They are of the model before, so of another loss: an approximation that ``merge`` lets fade. Norms of weights are
    the old ones too; ``coupled`` sums, which cannot be merged, are left out. Raises ValueError when the plan or the
    units belong to another model.
    """
    plan.check_model(statistics.units)
    old, modules = statistics.units, {}
    for name, part in zip(statistics.modules, IN_PARTS, strict=True):  # attention has o, mlp has down
        kept = [layer.kv_heads if name == "attention" else layer.channels for layer in plan.layers]
        features = [layer.features(part, sizes) for layer, sizes in zip(plan.layers, old.layers, strict=True)]
        modules[name] = statistics.modules[name].select(
            _flat(old.offsets(name), kept), _flat(old.feature_offsets(name), features)
        )
        count = modules[name].signed.shape[-1]
        if count != units.count(name):
            raise ValueError(f"expected a plan that leaves {units.count(name)} {name} units, got one of {count}")
    experts = statistics.experts[:, _flat(old.expert_offsets(), [layer.experts for layer in plan.layers])]
    return replace(statistics, units=units, modules=modules, experts=experts, influence=statistics.influence.clone())


def _flat(offsets: list[int], kept: list[Any]) -> Tensor:
    """Indices within each layer -> indices within all layers, (n,) int64."""
    indices = (torch.as_tensor(own, dtype=torch.long) for own in kept)
    return torch.cat([start + own for start, own in zip(offsets, indices, strict=False)])  # offsets end with the total


@dataclass(frozen=True)
class Sequences:
    """Calibration sequences of all steps: ``first`` for the first, then ``each`` new ones for every later step.

    ``ids`` (N, T) int64, packed as ``calibrate`` packs them, so that the first are those it would take.
    """

    ids: Tensor
    first: int
    each: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: Any,
        calibration: dict[str, Any], steps: int, each: int, known: int = 0,
    ) -> "Sequences":  # fmt: skip
        """Raises ValueError when there is too little text for all steps.

        ``known`` are the sequences of statistics that serve the first step: later ones come behind them.
        """
        first, seq_len = max(known, calibration.get("samples", 128)), calibration.get("seq_len", 512)
        samples, seed = first + (steps - 1) * each, calibration.get("seed", 0)
        return cls(pack_for(model, tokenizer, data, samples=samples, seq_len=seq_len, seed=seed), first, each)

    def of_step(self, step: int) -> Tensor:
        """Sequences of a step, counted from 1."""
        start = 0 if step == 1 else self.first + (step - 2) * self.each
        return self.ids[start : self.first + (step - 1) * self.each]
