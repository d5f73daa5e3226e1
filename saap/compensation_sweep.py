"""A walk through the blocks that sums what thinned Linears lack and solves for what makes up for it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saap.blocks import tensors_of
from saap.distributed import sum_over_ranks
from saap.experts import ExpertLinear, experts_of
from saap.families import linears_of
from saap.forward_blocks import ForwardBlocks
from saap.hidden_states import CPU
from saap.micro_batches import Progress
from saap.plan import Plan
from saap.refuse import refuse_nonfinite_layer
from saap.stream import Streaming
from saap.thinned_linear import Replacement, ThinnedExperts, ThinnedLinear
from saap.undo import Undo
from saap.units import IN_PARTS

CAUTION = 30.0  # times the automatic damping, for outputs that a Linear's inputs explain in part only


class Sweep(ForwardBlocks):
    """One walk through the blocks; methods in the order they are called.

    ``states`` holds the dense hidden states in 0; for ``inputs`` "pruned" those of the pruned model in 1, and what
    down shall lead to in 2: the dense block's output where the block ``_adds``, otherwise the dense down's.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, ids: Tensor, streaming: Streaming | None, method: str, inputs: str,
        damping: float | str, batch_size: int | str, progress: Progress | None,
    ) -> None:  # fmt: skip
        pruned = inputs == "pruned"
        super().__init__(
            model, plan.units, ids, streaming, taken=_equations_bytes(plan) if method == "least_squares" else 0,
            batch_size=batch_size, progress=progress, states=3 if pruned else 1, passes=3 if pruned else 1,
        )  # fmt: skip
        self.plan, self.method, self.damping, self.pruned = plan, method, damping, pruned

    def run(self) -> tuple[dict[str, Replacement], ...]:
        self.embed()
        if self.pruned:
            self.states[1].copy_(self.states[0])
        found: list[dict[str, Replacement]] = []
        protected = self.plan.settings.get("protect", ())
        for index, layer in enumerate(self.layers):
            targets = self._targets(index, every=self.pruned and any(found) and index not in protected)
            with self.here(tensors_of(layer)):
                refuse_nonfinite_layer(layer, self.family, index)
                for target in targets.values():
                    target.open()
                found.append(self._pruned(index, targets) if self.pruned else self._dense(index, targets))
        return tuple(found)

    def _targets(self, index: int, every: bool) -> dict[str, Any]:
        """{part: ThinnedLinear, or ThinnedExperts} of what loses some, or of ``every`` Linear that has inputs left."""
        sizes, kept = self.plan.units.layers[index], self.plan.layers[index]
        targets: dict[str, Any] = {}
        for part, linear in linears_of(self.layers[index], self.family).items():
            if part in IN_PARTS:
                features = kept.features(part, sizes)
                if len(features) < linear.in_features or (every and len(features)):
                    name = f"layer {index}, {self.family.path(part)}"
                    targets[part] = ThinnedLinear(linear, features, name, self.method, self.precision)
        if sizes.experts and kept.width < sizes.intermediate_size:
            down = {}
            for expert, own in zip(kept.experts, kept.channels_by_expert(sizes), strict=True):
                matrix = ExpertLinear(experts_of(self.layers[index], self.family), "down_proj", expert)
                name = f"layer {index}, expert {expert}"
                down[expert] = ThinnedLinear(matrix, own, name, self.method, self.precision)
            targets["down"] = ThinnedExperts(down)
        return targets

    def _dense(self, index: int, targets: dict[str, Any]) -> dict[str, Replacement]:
        """Both Linears against the dense block's own inputs, in one pass."""

        def step(rows: slice) -> None:
            with self.watched(index) as seen:
                out = self.finite(self.block(index, self.states[0][rows].to(self.device)), index, rows)
            sums = {part: target.missing(seen[part][0]) for part, target in targets.items()}
            self.states[0][rows] = out.to(CPU)  # from here on nothing runs out of memory, so nothing is repeated
            for part, target in targets.items():
                target.merge_(sums[part])

        self.micro_batches(step, counted=True)
        return {part: target.solved(self.damping) for part, target in targets.items()}

    def _pruned(self, index: int, targets: dict[str, Any]) -> dict[str, Replacement]:
        """o against the inputs that the pruned blocks before give it, then down against those with the new o."""
        found: dict[str, Replacement] = {}
        adds: list[bool] = []

        def attention(rows: slice) -> None:
            before, behind = (self.states[which][rows].to(self.device) for which in (0, 1))
            with self.watched(index) as seen:
                out = self.finite(self.block(index, before), index, rows)
                dense = dict(seen)
                if "o" in targets:
                    self.block(index, behind)
            if not adds:
                adds.append(_adds(before, dense, out))
            sums = None
            if "o" in targets:
                wanted = dense["o"][1].to(self.precision)
                if adds[0]:
                    wanted = wanted + (before.to(self.precision) - behind)
                sums = targets["o"].gap(seen["o"][0], wanted)
            self.states[2][rows] = (out if adds[0] else dense["down"][1].view_as(out)).to(CPU)
            self.states[0][rows] = out.to(CPU)  # from here on nothing runs out of memory, so nothing is repeated
            if sums is not None:
                targets["o"].merge_(sums)

        def mlp(rows: slice) -> None:
            if "down" in targets:
                behind = self.states[1][rows].to(self.device)
                wanted = self.states[2][rows].to(self.device, self.precision)
                with self.watched(index) as seen:
                    self.block(index, behind)
                if adds[0]:
                    wanted = wanted - behind - seen["o"][1]
                targets["down"].merge_(targets["down"].gap(seen["down"][0], wanted))

        def output(rows: slice) -> None:
            out = self.finite(self.block(index, self.states[1][rows].to(self.device)), index, rows)
            self.states[1][rows] = out.to(CPU)

        undo = Undo()
        try:
            for part, step in (("o", attention), ("down", mlp), ("", output)):
                self.micro_batches(step, counted=True)
                if part in targets:
                    found[part] = targets[part].solved(self.damping, CAUTION if adds[0] else 1.0)
                    undo.patch_forward(targets[part].linear, targets[part].forward(found[part]))
        finally:
            undo.restore()
        return found


def _adds(before: Tensor, seen: dict[str, Any], out: Tensor) -> bool:
    """Whether a block adds the outputs of o and down to its hidden states, without post-norms or factors.

    All ranks together decide, by the root mean square of what is unaccounted for: within a twentieth of what is
    added and what the dtype rounds off the sum, twice.
    """
    added = (seen["o"][1] + seen["down"][1].view_as(out)).double()
    off = out.double() - before - added
    squares = torch.stack([each.double().square().sum() for each in (off, added, out)])
    sum_over_ranks(squares)
    rest, parts, whole = squares.sqrt().tolist()
    return bool(rest <= 0.05 * parts + 2 * torch.finfo(out.dtype).eps * whole)


def _equations_bytes(plan: Plan) -> int:
    """Bytes of the largest layer's sums, in float64, and of one micro-batch's, in fp32."""
    largest = 0
    for sizes, kept in zip(plan.units.layers, plan.layers, strict=True):
        widths = [len(kept.features("o", sizes)), *[kept.width] * max(1, len(kept.experts))]
        largest = max(largest, sum(width * (width + sizes.hidden_size) for width in widths))
    return 12 * largest
