"""Compensation: new weights or biases for o and down, so that what a plan removes is missed least."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap import distributed
from saap.calibrate import check_sizes
from saap.compensation_sweep import Sweep
from saap.data import pack_for
from saap.micro_batches import Progress
from saap.plan import Plan
from saap.scores import check_option
from saap.serving.targets import check_config
from saap.stream import Streaming, resolve_streaming
from saap.thinned_linear import Replacement
from saap.units import Units, discover

COMPENSATIONS = ("none", "bias", "least_squares")
INPUTS = ("auto", "dense", "pruned")


@dataclass(frozen=True)
class Compensation:
    """{part: Replacement} for o and down of the layers that something makes up for, made for ``plan``; on the CPU."""

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
    inputs: str = "auto",
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
    singular gets up to a million times the damping.

    ``inputs`` "dense" takes X of the dense model, in one pass. "pruned" takes X of the model whose blocks so far are
    pruned and compensated, o before down, in three passes, for every Linear behind the first that loses some. Y is
    then what brings the hidden states behind the Linear to those of the dense model, where the block adds its
    Linears' outputs to them (with post-norms it does not: Y is the dense Linear's output), and "auto" damping is
    thirty times larger, since much of such a Y is not for this Linear to explain. Layers that the plan's settings
    protect are left as they are. "auto" is "pruned" for least squares, otherwise and for mixtures of experts
    "dense".

    ``method`` "bias" leaves the weights and adds the mean of what is missing, with dense inputs W_R mean(x_R) over
    the removed columns R (FLAP, arXiv 2312.11983), to a bias that is made where there is none. Of a mixture of
    experts every expert that stays is solved by itself over the tokens that the dense router sends it, with least
    squares and dense inputs only; nothing makes up for experts that are dropped, or for one without tokens.

    Calibration text and its arguments are those of ``calibrate``; Gram matrices are summed over the ranks of a
    torch.distributed group. Memory beyond the model: one block's Gram matrices in float64, the hidden states on
    the host, and the result. ``progress(done, total)`` counts this process's sequences times blocks times passes.
    The model is left as found. Raises ValueError before any pass for arguments, plans or data that do not fit,
    for biases that the plan's target does not take, and naming the layer for weights, hidden states or Gram matrices
    that are not finite or stay singular.
    """
    _check_options(method, inputs, damping)
    units = discover(model)
    plan.check_model(units)
    check_config(plan.settings.get("target"), model.config, method)
    _refuse_pruned_inputs(units, inputs)
    _check_experts(plan, method)
    if inputs == "auto":
        mixture = any(sizes.experts for sizes in units.layers)
        inputs = "pruned" if method == "least_squares" and not mixture else "dense"
    if not _loses_inputs(plan):
        warnings.warn("the plan leaves o and down as they are: there is nothing to compensate", stacklevel=2)
        return Compensation(plan, tuple({} for _ in plan.layers), {"compensate": "none"})
    check_sizes(model, samples, seq_len, batch_size)
    ids = distributed.share(pack_for(model, tokenizer, data, samples=samples, seq_len=seq_len, seed=seed))
    sweep = Sweep(model, plan, ids, resolve_streaming(model, stream), method, inputs, damping, batch_size, progress)
    with sweep.walking():
        layers = sweep.run()
    settings: dict[str, Any] = {"compensate": method, "compensation_inputs": inputs}
    settings |= {"damping": damping} if method == "least_squares" else {}
    return Compensation(plan, layers, settings)


def check_compensate(method: str, data: Any, inputs: str = "auto") -> None:
    """Raise ValueError for a compensation that does not exist, or that lacks the text it is computed on."""
    if method not in COMPENSATIONS:
        raise ValueError(f"compensate must be one of {', '.join(COMPENSATIONS)}; got {method!r}")
    check_option("compensation inputs", inputs, INPUTS)
    if method != "none" and data is None:
        raise ValueError(
            f"compensate {method!r} needs calibration text, which neither a plan nor statistics hold: "
            "expected data (--data), got none"
        )


def refuse_experts(units: Units, method: str, inputs: str = "auto") -> None:
    """Raise ValueError for a compensation that experts cannot have, whatever the plan."""
    _refuse_pruned_inputs(units, inputs)
    if method == "bias" and any(layer.experts for layer in units.layers):
        raise ValueError(
            f"compensate 'bias' is not supported for the experts of a {units.family} model, which have no biases: "
            'expected "least_squares" or "none"'
        )


def _refuse_pruned_inputs(units: Units, inputs: str) -> None:
    if inputs == "pruned" and any(layer.experts for layer in units.layers):
        raise ValueError(
            f"a mixture of experts ({units.family}) is compensated on inputs of the dense model only: expected "
            'inputs "auto" or "dense", got "pruned"'
        )


def _loses_inputs(plan: Plan) -> bool:
    """Whether an o, a down or an expert that stays loses input features."""
    return any(
        len(layer.kv_heads) < sizes.kv_heads or layer.width < sizes.intermediate_size
        for layer, sizes in zip(plan.layers, plan.units.layers, strict=True)
    )


def _check_experts(plan: Plan, method: str) -> None:
    for index, (layer, sizes) in enumerate(zip(plan.layers, plan.units.layers, strict=True)):
        if method == "bias" and sizes.experts and layer.width < sizes.intermediate_size:
            raise ValueError(f"experts have no biases to compensate by; layer {index} loses channels of its experts")


def _check_options(method: str, inputs: str, damping: float | str) -> None:
    if method not in COMPENSATIONS[1:]:
        raise ValueError(f"method must be one of {', '.join(COMPENSATIONS[1:])}; got {method!r}")
    check_option("inputs", inputs, INPUTS)
    if damping == "auto":
        return
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < math.inf:
        raise ValueError(f'damping must be "auto" or a positive number; got {damping!r}')
