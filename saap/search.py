"""Structure search: from scores and a budget to a plan (method section 2c)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saap.criteria import Scores
from saap.plan import LayerPlan, Plan
from saap.units import MODULES, Units

METHODS = ("global", "uniform")


@dataclass
class _Candidates:
    """What can be removed from one module of one layer, in order of rising importance.

    One candidate is one KV head, or as many channels as keep the width a multiple. ``order`` lists
    the units by score, ``ends[i]`` is how many units are gone after candidate i, and ``gain`` and
    ``cost`` are each candidate's summed score and its parameters.
    """

    order: Tensor
    ends: list[int]
    gain: Tensor
    cost: Tensor

    def kept(self, removed: int) -> tuple[int, ...]:
        """Indices kept after removing the first ``removed`` candidates, ascending."""
        gone = self.ends[removed - 1] if removed else 0
        return tuple(self.order[gone:].sort().values.tolist())


def search(
    scores: Scores,
    ratio: float | None = None,
    *,
    budget: int | None = None,
    ratio_of: str = "model",
    method: str = "global",
    multiple: int = 32,
    protect: Iterable[int] = (),
    modules: Iterable[str] = MODULES,
    uniform: bool = False,
) -> Plan:
    """Choose which units to keep so that at least ``ratio`` of the parameters goes.

    Give ``ratio``, a share in (0, 1) of all parameters (``ratio_of="model"``) or of the decoder layers'
    (``"blocks"``), or ``budget``, the most parameters the pruned model may have. ``global`` removes by
    one ranking of score per removed parameter; its plans are nested over ratios. ``uniform`` removes the
    same share of KV heads (nearest whole number) and then as many channels as the budget still
    needs from every layer. ``multiple`` divides every kept MLP width that changes. ``protect`` names
    layers left alone (negative counts from the end). ``uniform=True`` gives all layers the same sizes.

    At least one KV head and ``multiple`` channels stay per layer. Deterministic; ties go to the lower
    layer and index. Raises ValueError for bad options and, naming the largest, unreachable ratios.
    """
    units = scores.units
    protected = _check_protect(protect, len(units.layers))
    modules = _check_options(method, multiple, ratio_of, modules)
    if uniform and protected:
        raise ValueError("uniform=True gives every layer the same sizes, so no layer can be protected; got protect")
    target = _target(units, ratio, budget, ratio_of)
    candidates = {
        (layer, module): _candidates(scores, layer, module, multiple)
        for layer in range(len(units.layers))
        if layer not in protected
        for module in modules
    }
    _check_reachable(units, candidates, target, ratio_of)
    if method == "uniform" or uniform:
        removed = _same_everywhere(candidates, target, cheapest=method == "global")
    else:
        removed = _global_ranking(candidates, target)
    layers = []
    for index, sizes in enumerate(units.layers):
        kept = []
        for module in MODULES:
            found = candidates.get((index, module))
            kept.append(found.kept(removed[index, module]) if found else tuple(range(sizes.count(module))))
        layers.append(LayerPlan(*kept))
    settings: dict[str, Any] = scores.settings | {
        "search": method,
        "ratio": ratio,
        "budget": budget,
        "ratio_of": ratio_of,
        "multiple": multiple,
        "protect": sorted(protected),
        "modules": list(modules),
        "uniform": uniform,
    }
    return Plan(units, tuple(layers), settings)


def _candidates(scores: Scores, layer: int, module: str, multiple: int) -> _Candidates:
    sizes = scores.units.layers[layer]
    values, order = scores.layer(layer, module).sort(stable=True)
    count = len(values)
    if module == "attention":
        ends = list(range(1, count))
    else:
        first = count % multiple or multiple  # the first step brings the width to a multiple
        ends = list(range(first, count - multiple + 1, multiple))
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    bounds = torch.tensor([0, *ends])
    gain = total[bounds[1:]] - total[bounds[:-1]]
    cost = bounds.diff() * sizes.unit_parameters(module)
    return _Candidates(order, ends, gain, cost)


_Key = tuple[int, str]


def _global_ranking(candidates: dict[_Key, _Candidates], target: int) -> dict[_Key, int]:
    """Remove candidates in order of score per parameter until ``target`` parameters are gone."""
    keys = list(candidates)
    cost = torch.cat([candidates[key].cost for key in keys])
    # a running maximum keeps the order within a layer even where rounding inverts equal scores
    density = torch.cat([(c.gain / c.cost).cummax(0).values if len(c.cost) else c.gain for c in candidates.values()])
    owner = torch.repeat_interleave(torch.tensor([len(candidates[key].cost) for key in keys]))
    order = density.sort(stable=True).indices
    taken = int(torch.searchsorted(cost[order].cumsum(0), target)) + 1
    counts = torch.bincount(owner[order[:taken]], minlength=len(keys)).tolist()
    return dict(zip(keys, counts, strict=True))


def _same_everywhere(candidates: dict[_Key, _Candidates], target: int, *, cheapest: bool) -> dict[_Key, int]:
    """Remove the same number of candidates per module from every layer.

    ``cheapest`` tries every number of KV heads and keeps the one of lowest total score; otherwise
    the number of heads nearest to the asked share is used, or the next one that reaches the target.
    """
    by_module = {module: [c for (_, m), c in candidates.items() if m == module] for module in MODULES}
    heads = min((len(c.ends) for c in by_module["attention"]), default=0)
    steps = min((len(c.ends) for c in by_module["mlp"]), default=0)
    head_cost = sum(int(c.cost[0]) for c in by_module["attention"] if heads)
    step_cost = [sum(int(c.cost[i]) for c in by_module["mlp"]) for i in range(steps)]
    step_total = torch.tensor([0, *step_cost]).cumsum(0)
    best: tuple[float, int, int] | None = None
    everything = sum((len(c.ends) + 1) * int(c.cost[0]) for c in by_module["attention"] if heads)
    everything += sum(int(c.cost.sum()) for c in by_module["mlp"])
    share = target / everything
    for removed_heads in range(heads + 1):
        needed = max(0, target - removed_heads * head_cost)
        removed_steps = int(torch.searchsorted(step_total, needed))
        if removed_steps > steps:
            continue
        if cheapest:
            loss = sum(float(c.gain[:removed_heads].sum()) for c in by_module["attention"])
            loss += sum(float(c.gain[:removed_steps].sum()) for c in by_module["mlp"])
        else:
            loss = abs(removed_heads - share * (heads + 1)) if heads else 0.0
        if best is None or loss < best[0]:
            best = (loss, removed_heads, removed_steps)
    if best is None:
        raise ValueError("the ratio cannot be reached with the same sizes in every layer; use uniform=False")
    return {(layer, module): best[1] if module == "attention" else best[2] for layer, module in candidates}


def _target(units: Units, ratio: float | None, budget: int | None, ratio_of: str) -> int:
    if (ratio is None) == (budget is None):
        raise ValueError(f"give exactly one of ratio and budget; got ratio={ratio!r}, budget={budget!r}")
    if budget is not None:
        if not 0 < budget < units.total_parameters:
            raise ValueError(
                f"budget must lie between 0 and the model's {units.total_parameters} parameters; got {budget}"
            )
        return units.total_parameters - budget
    assert ratio is not None
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ValueError(f"ratio must lie strictly between 0 and 1; got {ratio!r}")
    return math.ceil(ratio * (units.total_parameters if ratio_of == "model" else units.block_parameters) - 1e-9)


def _check_reachable(units: Units, candidates: dict[_Key, _Candidates], target: int, ratio_of: str) -> None:
    largest = sum(int(c.cost.sum()) for c in candidates.values())
    if target > largest:
        whole = units.total_parameters if ratio_of == "model" else units.block_parameters
        raise ValueError(
            f"cannot remove {target / whole:.4f} of the {ratio_of} parameters: the largest reachable ratio with "
            f"these constraints is {math.floor(largest / whole * 1e4) / 1e4:.4f}"
        )


def _check_protect(protect: Iterable[int], layers: int) -> set[int]:
    chosen = list(protect)
    for index in chosen:
        if not -layers <= index < layers:
            raise ValueError(f"protect must name layers between {-layers} and {layers - 1}; got {index}")
    return {index % layers for index in chosen}


def _check_options(method: str, multiple: int, ratio_of: str, modules: Iterable[str]) -> tuple[str, ...]:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple must be a positive integer; got {multiple!r}")
    if ratio_of not in ("model", "blocks"):
        raise ValueError(f'ratio_of must be "model" or "blocks"; got {ratio_of!r}')
    chosen = tuple(module for module in MODULES if module in tuple(modules))
    unknown = set(modules) - set(MODULES)
    if unknown or not chosen:
        raise ValueError(f"modules must be among {', '.join(MODULES)}; got {tuple(modules)!r}")
    return chosen


def check_ratio(units: Units, ratio: float, **options: Any) -> None:
    """Raise the ValueError that ``search`` would raise for these options, without any scores."""
    attention, mlp = (torch.zeros(units.count(module), dtype=torch.float64) for module in MODULES)
    search(Scores(units, attention, mlp), ratio, **options)
