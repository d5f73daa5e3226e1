"""Compensation: new weights or biases for o and down, so that what a plan removes is missed least."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap import distributed
from saap.blocks import Blocks, tensors_of
from saap.calibrate import check_sizes
from saap.data import pack_for
from saap.experts import ExpertLinear, Routing, experts_of, patch_experts
from saap.families import family_of, linears_of
from saap.hidden_states import CPU, HiddenStates
from saap.micro_batches import Progress, fit_micro_batches
from saap.plan import Plan
from saap.refuse import refuse_nonfinite_layer
from saap.stream import Streaming, resolve_streaming, streamed_bytes
from saap.thinned_linear import Replacement, ThinnedExperts, ThinnedLinear
from saap.undo import Undo
from saap.units import IN_PARTS, Units, discover

COMPENSATIONS = ("none", "bias", "least_squares")
INPUTS = ("dense", "pruned")


@dataclass(frozen=True)
class Compensation:
    """{part: Replacement} for o and down of every layer that loses some, made for ``plan``; on the CPU."""

    plan: Plan
    layers: tuple[dict[str, Replacement], ...]
    settings: dict[str, Any]

    def check_plan(self, plan: Plan) -> None:
        """Raise ValueError unless ``plan`` keeps what this was computed for, of the same model."""
        mine, theirs = self.plan.units.fingerprint, plan.units.fingerprint
        if mine != theirs:
            raise ValueError(f"this compensation belongs to a model with fingerprint {mine}; got a plan for {theirs}")
        for index, (made, given) in enumerate(zip(self.plan.layers, plan.layers, strict=True)):
            if made != given:
                raise ValueError(f"this compensation was computed for another plan: layer {index} keeps other units")


def compensation(
    model: PreTrainedModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    *,
    method: str = "least_squares",
    inputs: str = "dense",
    damping: float | str = "auto",
    samples: int = 128,
    seq_len: int = 512,
    batch_size: int | str = "auto",
    seed: int = 0,
    stream: bool | str | Streaming = "auto",
    progress: Progress | None = None,
) -> Compensation:
    """What o and down of the dense ``model`` should become when ``plan`` is applied: give it to ``compact``.

    ``method`` "least_squares" gives the kept columns K of each Linear that loses some the weights
        V = argmin ||Y - X_K V' - b||_F^2 + damping * m * ||V - W_K||_F^2
    over calibration tokens, m the mean of the diagonal of X_K' X_K: Y is the dense Linear's output (without its
    bias), b is solved for where the Linear has a bias and 0 otherwise. ``damping`` "auto" is |K| over the tokens.
    Of what calibration says nothing about, such as dead channels, weights stay; a Gram matrix that is still
    singular gets up to a million times the damping. ``inputs`` "dense" takes X of the dense model, in one pass;
    "pruned" takes X of the model whose blocks so far are pruned and compensated, o before down, in three passes.
    ``method`` "bias" leaves the weights and adds the mean of what is missing, with dense inputs W_R mean(x_R)
    over the removed columns R (FLAP, arXiv 2312.11983), to a bias that is made where there is none. Of a
    mixture of experts every expert that stays is solved by itself over the tokens that the dense router sends it, with
    least squares and dense inputs only; nothing makes up for experts that are dropped, or for one without tokens.

    Calibration text and its arguments are those of ``calibrate``; Gram matrices are summed over the ranks of a
    torch.distributed group. Memory beyond the model: one block's Gram matrices in float64, the hidden states on
    the host, and the result. ``progress(done, total)`` counts this process's sequences times blocks times passes.
    The model is left as found. Raises ValueError before any pass for arguments, plans or data that do not fit,
    and naming the layer for weights, hidden states or Gram matrices that are not finite or stay singular.
    """
    _check_options(method, inputs, damping)
    units = discover(model)
    plan.check_model(units)
    _check_experts(plan, method, inputs)
    check_sizes(model, samples, seq_len, batch_size)
    ids = distributed.share(pack_for(model, tokenizer, data, samples=samples, seq_len=seq_len, seed=seed))
    sweep = _Sweep(model, plan, ids, resolve_streaming(model, stream), method, inputs, damping, batch_size, progress)
    undo = Undo()
    undo.eval_mode(model)
    try:
        with torch.no_grad():
            layers = sweep.run()
    finally:
        undo.restore()
        sweep.states.close()
    settings: dict[str, Any] = {"compensate": method, "compensation_inputs": inputs}
    settings |= {"damping": damping} if method == "least_squares" else {}
    return Compensation(plan, layers, settings)


class _Sweep(Blocks):
    """One walk through the blocks; methods in the order they are called.

    ``states`` holds the dense hidden states in 0; for ``inputs`` "pruned" those of the pruned model in 1
    and the outputs that the dense down gave in 2.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, ids: Tensor, streaming: Streaming | None, method: str, inputs: str,
        damping: float | str, batch_size: int | str, progress: Progress | None,
    ) -> None:  # fmt: skip
        family, units = family_of(model, plan.units.family), plan.units
        given = streaming or Streaming(device=model.device)
        device, dtype = given.resolved_device(model), given.dtype or model.dtype
        taken = _equations_bytes(plan) if method == "least_squares" else 0
        fit = fit_micro_batches(
            units, len(ids), ids.shape[1], dtype, device, batch_size=batch_size,
            streamed_bytes=taken + (0 if streaming is None else streamed_bytes(model, dtype)),
        )  # fmt: skip
        shape, pruned = (*ids.shape, units.layers[0].hidden_size), inputs == "pruned"
        super().__init__(
            model, family, ids, fit.batch,
            HiddenStates(3 if pruned else 1, shape, dtype, given.folder),
            device=device, dtype=given.dtype, progress=progress,
            total=(3 if pruned else 1) * len(units.layers) * len(ids),
        )  # fmt: skip
        self.plan, self.method, self.damping, self.pruned = plan, method, damping, pruned
        self.precision = torch.float64 if dtype == torch.float64 else torch.float32

    def run(self) -> tuple[dict[str, Replacement], ...]:
        self.embed()
        if self.pruned:
            self.states[1].copy_(self.states[0])
        found = []
        for index, layer in enumerate(self.layers):
            targets = self._targets(index)
            with self.here(tensors_of(layer)):
                refuse_nonfinite_layer(layer, self.family, index)
                for target in targets.values():
                    target.open()
                found.append(self._pruned(index, targets) if self.pruned else self._dense(index, targets))
        return tuple(found)

    def _targets(self, index: int) -> dict[str, Any]:
        """{part: ThinnedLinear, or ThinnedExperts} of what loses some."""
        sizes, kept = self.plan.units.layers[index], self.plan.layers[index]
        targets: dict[str, Any] = {}
        for part, linear in linears_of(self.layers[index], self.family).items():
            if part in IN_PARTS:
                features = kept.features(part, sizes)
                if len(features) < linear.in_features:
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
            with self._watched(index) as seen:
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

        def attention(rows: slice) -> None:
            with self._watched(index) as seen:
                out = self.finite(self.block(index, self.states[0][rows].to(self.device)), index, rows)
                dense = dict(seen)
                if "o" in targets:
                    self.block(index, self.states[1][rows].to(self.device))
            sums = targets["o"].gap(seen["o"][0], dense["o"][1]) if "o" in targets else None
            if self.family.experts is None:  # they keep what they have
                self.states[2][rows] = dense["down"][1].view_as(out).to(CPU)
            self.states[0][rows] = out.to(CPU)  # from here on nothing runs out of memory, so nothing is repeated
            if sums is not None:
                targets["o"].merge_(sums)

        def mlp(rows: slice) -> None:
            if "down" in targets:
                with self._watched(index) as seen:
                    self.block(index, self.states[1][rows].to(self.device))
                target = targets["down"]
                target.merge_(target.gap(seen["down"][0], self.states[2][rows].to(self.device)))

        def output(rows: slice) -> None:
            out = self.finite(self.block(index, self.states[1][rows].to(self.device)), index, rows)
            self.states[1][rows] = out.to(CPU)

        undo = Undo()
        try:
            for part, step in (("o", attention), ("down", mlp), ("", output)):
                self.micro_batches(step, counted=True)
                if part in targets:
                    found[part] = targets[part].solved(self.damping)
                    undo.patch_forward(targets[part].linear, targets[part].forward(found[part]))
        finally:
            undo.restore()
        return found

    @contextmanager
    def _watched(self, index: int) -> Iterator[dict[str, Any]]:
        """{part: (inputs, outputs)} of the latest forward of o and down while the context is open.

        Of experts the inputs of down are one tensor per expert, and there are no outputs.
        """
        seen: dict[str, Any] = {}
        undo = Undo()

        def watch_experts(rows: Tensor, routing: Routing) -> Tensor:
            seen["down"] = rows.split(routing.counts), None
            return rows

        def watch(part: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[part] = args[0], output

        try:
            for part, linear in linears_of(self.layers[index], self.family).items():
                if part in IN_PARTS:
                    undo.add(linear.register_forward_hook(partial(watch, part)).remove)
            if self.family.experts is not None:
                undo.add(patch_experts(self.layers[index], self.family, watch_experts))
            yield seen
        finally:
            undo.restore()


def check_compensate(method: str, data: Any) -> None:
    """Raise ValueError for a compensation that does not exist, or that lacks the text it is computed on."""
    if method not in COMPENSATIONS:
        raise ValueError(f"compensate must be one of {', '.join(COMPENSATIONS)}; got {method!r}")
    if method != "none" and data is None:
        raise ValueError(
            f"compensate {method!r} needs calibration text, which neither a plan nor statistics hold: "
            "expected data (--data), got none"
        )


def refuse_experts(units: Units, method: str) -> None:
    """Raise ValueError for a compensation that experts cannot have."""
    if method == "bias" and any(layer.experts for layer in units.layers):
        raise ValueError(
            f"compensate 'bias' is not supported for the experts of a {units.family} model, which have no biases: "
            'expected "least_squares" or "none"'
        )


def _check_experts(plan: Plan, method: str, inputs: str) -> None:
    for index, (layer, sizes) in enumerate(zip(plan.layers, plan.units.layers, strict=True)):
        if sizes.experts and layer.width < sizes.intermediate_size and (method, inputs) != ("least_squares", "dense"):
            raise ValueError(
                f"experts are compensated by method 'least_squares' with inputs 'dense' only; layer {index} loses "
                f"channels of its experts, got {method!r} and {inputs!r}"
            )


def _check_options(method: str, inputs: str, damping: float | str) -> None:
    if method not in COMPENSATIONS[1:]:
        raise ValueError(f"method must be one of {', '.join(COMPENSATIONS[1:])}; got {method!r}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs must be one of {', '.join(INPUTS)}; got {inputs!r}")
    if damping == "auto":
        return
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < math.inf:
        raise ValueError(f'damping must be "auto" or a positive number; got {damping!r}')


def _equations_bytes(plan: Plan) -> int:
    """Bytes of the largest layer's sums, in float64, and of one micro-batch's, in fp32."""
    largest = 0
    for sizes, kept in zip(plan.units.layers, plan.layers, strict=True):
        widths = [len(kept.features("o", sizes)), *[kept.width] * max(1, len(kept.experts))]
        largest = max(largest, sum(width * (width + sizes.hidden_size) for width in widths))
    return 12 * largest
