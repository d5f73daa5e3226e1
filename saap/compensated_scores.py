"""Scores for a search that least squares follows: what removing a unit costs when those that stay make up for it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap import distributed
from saap.backward_elimination import costs_in_turn
from saap.blocks import tensors_of
from saap.calibrate import check_sizes
from saap.data import pack_for
from saap.experts import ExpertLinear, experts_of
from saap.families import linears_of
from saap.forward_blocks import ForwardBlocks
from saap.hidden_states import CPU
from saap.least_squares import NormalEquations
from saap.micro_batches import Progress
from saap.refuse import refuse_nonfinite_layer
from saap.scores import Scores
from saap.stream import Streaming, resolve_streaming
from saap.units import IN_PARTS, MODULES, Units, discover, module_of

ENOUGH = 40.0  # tokens of calibration text per input: with 46 or more means over five seeds gain
COPIES = 4  # of a Gram matrix, and of the weight, that backward elimination holds at once in float64


def compensated_scores(
    scores: Scores,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    *,
    samples: int = 128,
    seq_len: int = 512,
    batch_size: int | str = "auto",
    seed: int = 0,
    stream: bool | str | Streaming = "auto",
    progress: Progress | None = None,
) -> Scores:
    """``scores`` of ``model`` as they are when ``compensation`` by least squares follows the search.

    A score says what removing a unit alone costs. What of its output the inputs of o or down that stay can give
    instead costs nothing, and what else may go depends on what went: ``costs_in_turn`` removes unit after unit of
    every Linear, and each gets its score times what its removal takes from the Linear's output in its turn, as a
    share of what it would take alone. Meant for scores that grow with the square of what is removed, as
    second-order ones do. Inputs are those of the dense model over the calibration text, whose arguments are those of
    ``calibrate``, in one forward pass; Gram matrices are damped and centred as with dense inputs in ``compensation``,
    and summed over the ranks of a torch.distributed group. Of a mixture of experts every expert is taken by itself over
    the tokens that the router sends it, and one without tokens keeps its scores. Fluctuations stay as they are.

    In little text inputs look more alike than they are: with fewer than ``ENOUGH`` tokens for every input of the
    widest o or down a search by these scores does worse than by plain ones in some seeds, and ``prune`` takes those
    unless told otherwise. Settings say how many ``tokens_per_input`` there are.

    Memory beyond the model: one block's Gram matrices in float64, four times the largest of them and its Linear's
    weight, and the hidden states on the host. ``progress(done, total)`` counts this process's sequences times blocks.
    The model is left as found.
    Raises ValueError before the pass for scores of another model, or that are compensated already, and for arguments
    or data that do not fit; during it, naming the layer, for weights, hidden states or inputs that are not finite.
    """
    if scores.settings.get("compensated_scores"):
        raise ValueError("expected scores as a criterion gives them; these are compensated already")
    units = discover(model)
    scores.units.check_same(units, "these scores belong to")
    check_sizes(model, samples, seq_len, batch_size)
    ids = distributed.share(pack_for(model, tokenizer, data, samples=samples, seq_len=seq_len, seed=seed))
    walk = _Walk(
        model, units, ids, resolve_streaming(model, stream), taken=_gram_bytes(units), batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    with walk.walking():
        walk.embed()
        found = [walk.costs(index, scores) for index in range(walk.count)]
    values: dict[str, Any] = {module: torch.cat([layer[module] for layer in found]) for module in found[0]}
    settings = {"compensated_scores": True, "tokens_per_input": tokens_per_input(units, samples * seq_len)}
    return replace(scores, **values, settings=scores.settings | settings)


def tokens_per_input(units: Units, tokens: int) -> float:
    """What of ``tokens`` of calibration text there is for every input of the widest o or down, rounded to hundredths.

    An expert has its share of the tokens, as if the router treated all alike. One number for the whole model: where
    one of o and down alone was compensated, heads and channels would no longer compare.
    """
    shares = [tokens / (layer.query_heads * layer.head_dim) for layer in units.layers if layer.query_heads]
    shares += [
        tokens * layer.used_share("mlp") / layer.intermediate_size for layer in units.layers if layer.intermediate_size
    ]
    return round(min(shares, default=float(tokens)), 2)


class _Walk(ForwardBlocks):
    def costs(self, index: int, scores: Scores) -> dict[str, Tensor]:
        """{module: (U_l,)} of one layer, whose inputs become those of the next."""
        found = {module: scores.layer(index, module) for module in MODULES}
        with self.here(tensors_of(self.layers[index])):
            refuse_nonfinite_layer(self.layers[index], self.family, index)
            linears = self._linears(index)
            for part, sums in self._gram(index, linears).items():
                module, name = module_of(part), f"layer {index}, {self.family.path(part)}"
                alone = found[module].chunk(len(sums))
                turns = [_costs(*each, name) for each in zip(sums, linears[part], alone, strict=True)]
                found[module] = torch.cat(turns)
        return found

    def _linears(self, index: int) -> dict[str, list[Any]]:
        """{part: its Linear, or those of all experts} of what has inputs that may go."""
        layer = self.layers[index]
        found: dict[str, list[Any]] = {
            part: [linear]
            for part, linear in linears_of(layer, self.family).items()
            if part in IN_PARTS and linear.in_features
        }
        if self.family.experts is not None:
            mixture = experts_of(layer, self.family)
            found["down"] = [ExpertLinear(mixture, "down_proj", each) for each in range(len(mixture.down_proj))]
        return found

    def _gram(self, index: int, linears: dict[str, list[Any]]) -> dict[str, list[NormalEquations]]:
        """Sums over the inputs of every Linear, without outputs."""
        total = {
            part: [NormalEquations.zeros(linear.in_features, 0, self.device) for linear in own]
            for part, own in linears.items()
        }

        def step(rows: slice) -> None:
            with self.watched(index) as seen:
                out = self.finite(self.block(index, self.states[0][rows].to(self.device)), index, rows)
            sums = {part: [self._sums(x) for x in _of_experts(seen[part][0])] for part in total}
            self.states[0][rows] = out.to(CPU)  # from here on nothing runs out of memory, so nothing is repeated
            for part, own in sums.items():
                for mine, new in zip(total[part], own, strict=True):
                    mine.merge_(new)

        self.micro_batches(step, counted=True)
        return total

    def _sums(self, inputs: Tensor) -> NormalEquations:
        rows = inputs.flatten(0, -2).to(self.precision)
        return NormalEquations.of(rows, rows[:, :0])


def _of_experts(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _costs(sums: NormalEquations, linear: Any, losses: Tensor, name: str) -> Tensor:
    """What removing each unit of one Linear costs in its turn, (U,) on the CPU; ``losses`` (U,) alone."""
    sums.all_reduce()
    if not sums.tokens:  # an expert that none was routed to
        return losses
    gram = sums.damped(linear.bias is not None, name)
    if gram is None:
        return losses
    # one rank decides: another device, or number of threads, may round a tie to the other side
    first = distributed.rank() == 0
    found = costs_in_turn(gram, linear.weight, losses) if first else gram.new_zeros(len(losses))
    distributed.sum_over_ranks(found)
    return found.to(CPU)


def _gram_bytes(units: Units) -> int:
    """Bytes of one layer's Gram matrices, float64 and a micro-batch's in fp32, and of what the largest takes beside."""
    largest = 0
    for sizes in units.layers:
        inputs = [sizes.query_heads * sizes.head_dim, *[sizes.intermediate_size] * max(1, sizes.experts)]
        beside = 8 * COPIES * max(inputs) * (max(inputs) + sizes.hidden_size)
        largest = max(largest, 12 * sum(each**2 for each in inputs) + beside)
    return largest
