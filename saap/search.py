"""Structure search: from scores and a budget to a plan (method section 2c)."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from saap.candidates import Candidates, Key, in_order_of_density, same_everywhere
from saap.drop_experts import as_before, kept_experts, without_dropped
from saap.experts import GROUPED_MULTIPLE
from saap.plan import LayerPlan, Plan
from saap.resources import Resource, named_resource
from saap.scores import Scores
from saap.serving.targets import constraints
from saap.size_rules import SizeRule
from saap.standardise import with_fluctuation, within_layers
from saap.tensor_parallel import size_of
from saap.units import MODULES, Units

METHODS = ("global", "standardised", "fluctuation", "uniform")


def search(
    scores: Scores,
    ratio: float | None = None,
    *,
    budget: float | None = None,
    resource: str | Resource = "parameters",
    ratio_of: str = "model",
    method: str = "global",
    fluctuation_weight: float = 0.5,
    multiple: int | None = None,
    protect: Iterable[int] = (),
    modules: Iterable[str] = MODULES,
    uniform: bool = False,
    allow_empty: bool = False,
    keep_experts: int | None = None,
    tensor_parallel: int = 1,
    target: str | None = None,
) -> Plan:
    """Choose which units to keep so that at least ``ratio`` of a resource is saved.

    Give ``ratio``, a share in (0, 1) of the whole model (``ratio_of="model"``) or of the decoder layers
    (``"blocks"``), or ``budget``, the most that the pruned model may take. ``resource`` says of what:
    "parameters", "macs", "bytes", or a ``saap.resources.Resource`` (``Macs(context)``, ``Bytes(...)``,
    ``Latency(table)``).

    ``global`` removes by one ranking of score per saved resource; its plans are nested over ratios.
    ``standardised`` ranks z-scores, taken per module and layer, as FLAP does; ``fluctuation`` ranks z-scores,
    taken per module over all layers, less ``fluctuation_weight`` times those of the fluctuation over sequences,
    for criteria that have one. ``uniform`` removes the same share of KV heads (nearest allowed number) and then
    as many channels as the budget still needs from every layer. ``multiple`` (32, or what ``target`` asks for) divides
    every kept MLP width that changes; a width that is no larger stays, and the budget has to come from elsewhere.
    ``protect`` names layers left alone (negative counts from the end). ``uniform=True`` gives all layers one size.

    ``tensor_parallel`` devices can share every layer of the pruned model, as vLLM does it: they divide the width of its
    MLP, or of each expert, and its query heads, and its KV heads are a multiple of them or a divisor of them (then
    each KV head is copied). ``target`` names the runtime that must take every layer: "transformers", "vllm",
    "llama.cpp", "edge" or "gpu", see ``saap.serving.targets``. Sizes that either refuses shrink to the next that it
    takes before the search, with ``allow_empty`` to none where there is no other.

    In a mixture of experts every expert of a layer keeps the same width, ``multiple`` must be one of 8, and
    ``keep_experts`` first drops whole experts: each layer that is not protected keeps so many, those of the
    highest router-weighted importance (``saap.drop_experts``), and heads and channels make up what is left of the
    budget. With neither ratio nor budget nothing else goes.

    At least one KV head and ``multiple`` channels stay per layer, unless ``allow_empty`` lets whole attentions and
    MLPs, but no experts, go; the attention of ``units.anchors`` stays in any case. Deterministic; ties go to the lower
    layer and index. Raises ValueError for bad options; for unreachable ratios, naming the largest; for ratios below
    what ``keep_experts``, ``tensor_parallel`` and ``target`` remove alone; for layers that ``tensor_parallel`` devices
    cannot share, or ``target`` not take, and that may not shrink, or not far enough; for options that contradict
    ``target``; and for models that it cannot take at all.
    """
    units = scores.units
    protected = _check_protect(protect, len(units.layers))
    modules = _check_options(method, fluctuation_weight, multiple, ratio_of, modules)
    _check_uniform(units, uniform, protected)
    multiple, rule = constraints(
        target, units, multiple=multiple, tensor_parallel=tensor_parallel, allow_empty=allow_empty, uniform=uniform
    )
    _check_multiple(units, multiple, modules)
    resource = named_resource(resource)
    resource.check(units)
    whole, of_what = resource.whole(units, ratio_of), f"{ratio_of} {resource.unit}"
    kept = None if keep_experts is None else kept_experts(scores, keep_experts, protected)
    left = scores if kept is None else without_dropped(scores, kept)
    only_experts = kept is not None and ratio is None and budget is None
    asked = 0.0 if only_experts else _asked(whole, ratio, budget, resource, ratio_of)
    candidates = _candidates(
        _ranked(left, method, fluctuation_weight), protected, modules, multiple, resource,
        by_unit=method in ("standardised", "fluctuation"), allow_empty=allow_empty, rule=rule,
    )  # fmt: skip
    experts, forced = whole - resource.whole(left.units, ratio_of), sum(c.forced for c in candidates.values())
    gone = experts + forced
    if ratio is not None and asked - gone < -1e-9 * whole:
        by = {f"keep_experts={keep_experts}": experts, rule.name: forced}
        _refuse_gone(ratio, gone / whole, [option for option, share in by.items() if share], of_what)
    removed = _removed(candidates, asked, gone, whole, of_what, method, uniform)
    layers = _layers(left.units, candidates, removed)
    layers = layers if kept is None else as_before(layers, units, kept)
    settings: dict[str, Any] = scores.settings | {
        "search": method, "ratio": ratio, "budget": budget, "ratio_of": ratio_of, "multiple": multiple,
        "protect": sorted(protected), "modules": list(modules), "uniform": uniform, "allow_empty": allow_empty,
    }  # fmt: skip
    settings |= {} if keep_experts is None else {"keep_experts": keep_experts}
    settings |= {} if tensor_parallel == 1 else {"tensor_parallel": tensor_parallel}
    settings |= {} if target is None else {"target": target}
    settings |= resource.settings() | ({"fluctuation_weight": fluctuation_weight} if method == "fluctuation" else {})
    return Plan(units, layers, settings)


def _removed(
    candidates: dict[Key, Candidates], asked: float, gone: float, whole: float, of_what: str, method: str, uniform: bool
) -> dict[Key, int]:
    """How many candidates of each module go, so that with what is ``gone`` all that is ``asked`` is saved."""
    target = asked - gone
    _check_reachable(candidates.values(), target, gone, whole, of_what)
    if target <= 0:
        return dict.fromkeys(candidates, 0)
    if method == "uniform" or uniform:
        return same_everywhere(candidates, target, whole, cheapest=method != "uniform", gone=gone)
    return in_order_of_density(candidates, target)


def _candidates(
    scores: Scores, protected: set[int], modules: tuple[str, ...], multiple: int, resource: Resource, *,
    by_unit: bool, allow_empty: bool, rule: SizeRule,
) -> dict[Key, Candidates]:  # fmt: skip
    units, found = scores.units, {}
    for layer, sizes in enumerate(units.layers):
        for module in MODULES:
            if layer in protected or module not in modules:
                why = " of a protected layer" if layer in protected else f" where only {modules[0]} is pruned"
                rule.check(sizes, layer, module, size_of(sizes, module), why)
                continue
            stays = layer in units.anchors if module == "attention" else bool(sizes.experts)
            found[layer, module] = Candidates.of(
                scores, layer, module, multiple, resource,
                by_unit=by_unit, allow_empty=allow_empty and not stays, rule=rule,
            )  # fmt: skip
    return found


def _ranked(scores: Scores, method: str, fluctuation_weight: float) -> Scores:
    if method == "standardised":
        return within_layers(scores)
    if method == "fluctuation":
        return with_fluctuation(scores, fluctuation_weight)
    return scores


def _layers(units: Units, candidates: dict[Key, Candidates], removed: dict[Key, int]) -> tuple[LayerPlan, ...]:
    layers = []
    for index, sizes in enumerate(units.layers):
        kept = []
        for module in MODULES:
            found = candidates.get((index, module))
            kept.append(found.kept(removed[index, module]) if found else tuple(range(sizes.count(module))))
        layers.append(LayerPlan(*kept))
    return tuple(layers)


def _asked(whole: float, ratio: float | None, budget: float | None, resource: Resource, ratio_of: str) -> float:
    """How much of the resource is to be saved; what is met but for rounding is met."""
    if (ratio is None) == (budget is None):
        raise ValueError(f"give exactly one of ratio and budget; got ratio={ratio!r}, budget={budget!r}")
    if budget is not None:
        if not 0 < budget < whole:
            raise ValueError(
                f"budget must lie between 0 and the {whole:.12g} {resource.unit} of the {ratio_of}; got {budget}"
            )
        return (whole - budget) * (1 - 1e-12)
    assert ratio is not None
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ValueError(f"ratio must lie strictly between 0 and 1; got {ratio!r}")
    return ratio * whole * (1 - 1e-12)


def _check_reachable(
    candidates: Iterable[Candidates], target: float, gone: float, whole: float, of_what: str
) -> None:  # fmt: skip
    largest = sum(float(c.saved[-1]) for c in candidates) + gone
    target += gone
    if target > largest:
        raise ValueError(
            f"cannot remove {target / whole:.4f} of the {of_what}: the largest reachable ratio with "
            f"these constraints is {int(largest / whole * 1e4) / 1e4:.4f}"
        )


def _refuse_gone(ratio: float, gone: float, by: list[str], of_what: str) -> None:
    raise ValueError(
        f"{' and '.join(by)} alone remove{'s' if len(by) == 1 else ''} {math.ceil(gone * 1e4) / 1e4:.4f} of the "
        f"{of_what}: expected a ratio of at least that, got {ratio}"
    )


def _check_protect(protect: Iterable[int], layers: int) -> set[int]:
    chosen = list(protect)
    for index in chosen:
        if not -layers <= index < layers:
            raise ValueError(f"protect must name layers between {-layers} and {layers - 1}; got {index}")
    return {index % layers for index in chosen}


def _check_options(
    method: str, fluctuation_weight: float, multiple: int | None, ratio_of: str, modules: Iterable[str]
) -> tuple[str, ...]:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not math.isfinite(fluctuation_weight):
        raise ValueError(f"fluctuation_weight must be finite; got {fluctuation_weight!r}")
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise ValueError(f"multiple must be a positive integer; got {multiple!r}")
    if ratio_of not in ("model", "blocks"):
        raise ValueError(f'ratio_of must be "model" or "blocks"; got {ratio_of!r}')
    chosen = tuple(module for module in MODULES if module in tuple(modules))
    unknown = set(modules) - set(MODULES)
    if unknown or not chosen:
        raise ValueError(f"modules must be among {', '.join(MODULES)}; got {tuple(modules)!r}")
    return chosen


def _check_uniform(units: Units, uniform: bool, protected: set[int]) -> None:
    if uniform and protected:
        raise ValueError("uniform=True gives every layer the same sizes, so no layer can be protected; got protect")
    sizes = {(layer.kv_heads, layer.intermediate_size, layer.experts) for layer in units.layers}
    if uniform and len(sizes) > 1:
        raise ValueError(f"uniform=True needs a model whose layers have one size; got {len(sizes)} different ones")


def _check_multiple(units: Units, multiple: int, modules: tuple[str, ...]) -> None:
    if "mlp" in modules and any(layer.experts for layer in units.layers) and multiple % GROUPED_MULTIPLE:
        raise ValueError(
            f"multiple must be a multiple of {GROUPED_MULTIPLE} for mixtures of experts, whose grouped products "
            f"in transformers need such widths; got {multiple}"
        )


def check_ratio(units: Units, ratio: float, **options: Any) -> None:
    """Raise the ValueError that ``search`` would raise for these options, without any scores."""
    attention, mlp = (torch.zeros(units.count(module), dtype=torch.float64) for module in MODULES)
    flat: dict[str, Any] = {"attention": attention, "mlp": mlp}
    experts = torch.zeros(units.expert_offsets()[-1], dtype=torch.float64)
    search(Scores(units, attention, mlp, fluctuation=flat, experts=experts), ratio, **options)
