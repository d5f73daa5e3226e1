"""What a search can remove: runs of the lowest units of each module, what they save and what they lose."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saap.resources import Resource
from saap.scores import Scores
from saap.size_rules import SizeRule, allowed_counts

Key = tuple[int, str]  # layer and module


@dataclass(frozen=True)
class Candidates:
    """What can be removed from one module of one layer, in order of rising score.

    One candidate is as many KV heads, or channels, as lead to the next size that is allowed; of channels so many of
    every expert, because all experts of a layer have one width, each its own lowest. ``order`` (E, n) lists the units
    of each expert by score, E 1 without experts; ``ends[i]`` is how many units of each are gone after i candidates;
    ``saved`` and ``lost`` are what those candidates save of the resource and lose of the score together, both (m + 1,)
    from 0 on. Where the size that the module has is not allowed, ``ends`` starts with the units that go in any
    case, and ``forced`` is what they save.
    """

    order: Tensor
    ends: Tensor
    saved: Tensor
    lost: Tensor
    forced: float = 0.0

    @classmethod
    def of(
        cls, scores: Scores, layer: int, module: str, multiple: int, resource: Resource,
        *, by_unit: bool = False, allow_empty: bool = False, rule: SizeRule | None = None,
    ) -> "Candidates":  # fmt: skip
        """Candidates of one module; ``by_unit`` takes scores as they are, not per saved resource.

        ``allow_empty`` lets the last KV head or the last multiple of channels go too. What stays satisfies
        ``rule``; raises ValueError where no size does.
        """
        sizes = scores.units.layers[layer]
        rows = max(1, sizes.experts) if module == "mlp" else 1
        values, order = scores.layer(layer, module).view(rows, -1).sort(stable=True)
        count = values.shape[1]
        order = order + torch.arange(rows)[:, None] * count
        allowed = allowed_counts(sizes, module, multiple, rule, allow_empty=allow_empty)
        if not allowed and rule is not None:
            rule.check(sizes, layer, module, count, " or any smaller size that it may take")
        ends = count - torch.tensor(allowed)
        whole, cost = resource.module(sizes, module, torch.tensor([count, *allowed]).double() * rows).tensor_split([1])
        saved = (cost[0] - cost).cummax(0).values  # where a smaller size is no faster nothing is saved
        lost = torch.cat([values.new_zeros(1), values.sum(0).cumsum(0)])[ends]
        lost = lost - lost[0]
        if by_unit:
            lost = torch.cat([lost[:1], (lost.diff() / (ends.diff() * rows) * saved.diff()).cumsum(0)])
        return cls(order, ends, saved, lost, float(whole[0] - cost[0]))

    def kept(self, removed: int) -> tuple[int, ...]:
        """Indices kept after removing the first ``removed`` candidates, and what goes in any case, ascending."""
        return tuple(self.order[:, int(self.ends[removed]) :].flatten().sort().values.tolist())

    def steps(self) -> tuple[Tensor, Tensor]:
        """Ends (m,) and densities (m,) of the steps that a ranking takes: lost score per saved resource, rising.

        Candidates join one step where the next would be cheaper, or saves nothing by itself: the corners of
        the lower convex hull of ``lost`` over ``saved``.
        """
        density = self.lost.diff() / self.saved.diff()
        if len(density) and bool((self.saved.diff() > 0).all()) and bool((density.diff() >= 0).all()):
            return torch.arange(1, len(self.ends)), density
        hull = [0]
        points = list(zip(self.saved.tolist(), self.lost.tolist(), strict=True))
        for index in range(1, len(points)):
            if points[index][0] <= points[hull[-1]][0]:
                continue  # saves nothing over a smaller step
            while len(hull) > 1 and _slope(points, hull[-1], index) <= _slope(points, hull[-2], hull[-1]):
                hull.pop()
            hull.append(index)
        corners = torch.tensor(hull)
        return corners[1:], self.lost[corners].diff() / self.saved[corners].diff()


def _slope(points: list[tuple[float, float]], start: int, stop: int) -> float:
    return (points[stop][1] - points[start][1]) / (points[stop][0] - points[start][0])


def in_order_of_density(candidates: dict[Key, Candidates], target: float) -> dict[Key, int]:
    """How many candidates of each module go when steps go by rising density until ``target`` is saved.

    The last step is cut short where fewer of its candidates are enough.
    """
    keys = list(candidates)
    steps = [candidates[key].steps() for key in keys]
    density = torch.cat([d for _, d in steps])
    owner = torch.repeat_interleave(torch.tensor([len(d) for _, d in steps]))
    saved = torch.cat([candidates[key].saved[ends].diff(prepend=density.new_zeros(1)) for key, (ends, _) in
                       zip(keys, steps, strict=True)])  # fmt: skip
    order = density.sort(stable=True).indices
    total = saved[order].cumsum(0)
    taken = min(int(torch.searchsorted(total, target)) + 1, len(order))
    counts = torch.bincount(owner[order[:taken]], minlength=len(keys)).tolist()
    removed = {key: int(ends[n - 1]) if n else 0 for key, n, (ends, _) in zip(keys, counts, steps, strict=True)}
    last = keys[int(owner[order[taken - 1]])]
    surplus = float(total[taken - 1]) - target
    enough = candidates[last].saved >= candidates[last].saved[removed[last]] - surplus
    return removed | {last: min(removed[last], int(enough.int().argmax()))}


def same_everywhere(
    candidates: dict[Key, Candidates], target: float, whole: float, *, cheapest: bool, gone: float = 0.0
) -> dict[Key, int]:
    """Remove the same number of candidates per module from every layer.

    ``cheapest`` tries every number of KV heads and keeps the one of lowest total score; otherwise
    the allowed number of heads nearest to the asked share is used, or the next one that reaches the target.
    ``target`` is what is left to be saved, ``gone`` what was saved before, for the error.
    """
    heads_saved, heads_lost = _over_layers(candidates, "attention")
    steps_saved, steps_lost = _over_layers(candidates, "mlp")
    off_share = torch.zeros(len(heads_saved)) if cheapest else _off_share(candidates, target, float(steps_saved[-1]))
    best: tuple[float, int, int] | None = None
    for removed_heads in range(len(heads_saved)):
        removed_steps = int(torch.searchsorted(steps_saved, target - heads_saved[removed_heads]))
        if removed_steps == len(steps_saved):
            continue
        loss = float(heads_lost[removed_heads] + steps_lost[removed_steps] if cheapest else off_share[removed_heads])
        if best is None or loss < best[0]:
            best = (loss, removed_heads, removed_steps)
    if best is None:
        largest = (float(heads_saved[-1] + steps_saved[-1]) + gone) / whole
        raise ValueError(
            f"cannot remove {(target + gone) / whole:.4f} by taking the same from every layer: the largest reachable "
            f"ratio so is {int(largest * 1e4) / 1e4:.4f}; other methods than uniform reach more"
        )
    return {(layer, module): best[1] if module == "attention" else best[2] for layer, module in candidates}


def _off_share(candidates: dict[Key, Candidates], target: float, channels: float) -> Tensor:
    """By the number of attention candidates that go: KV heads between what is gone and the asked share of them, (n,).

    The share is of what all heads and ``channels`` together can save; a last head that must stay counts as the first.
    """
    found = [c for (_, module), c in candidates.items() if module == "attention"]
    most = min((len(c.ends) for c in found), default=1)
    if most == 1:
        return torch.zeros(1, dtype=torch.float64)  # nothing to choose from
    heads = sum(
        float(c.saved[-1] + (c.order.shape[1] - c.ends[-1]) * c.saved[1] / (c.ends[1] - c.ends[0])) for c in found
    )
    forced = sum(c.forced for c in candidates.values())
    share = (target + forced) / (heads + channels + forced)
    gone = torch.stack([c.ends[:most] for c in found]).double().mean(0)
    return (gone - share * min(c.order.shape[1] for c in found)).abs()


def _over_layers(candidates: dict[Key, Candidates], module: str) -> tuple[Tensor, Tensor]:
    """Sums over layers of ``saved`` and ``lost`` by the number of candidates, as far as every layer has them."""
    found = [c for (_, m), c in candidates.items() if m == module]
    if not found:
        return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    most = min(len(c.ends) for c in found)
    return torch.stack([c.saved[:most] for c in found]).sum(0), torch.stack([c.lost[:most] for c in found]).sum(0)
