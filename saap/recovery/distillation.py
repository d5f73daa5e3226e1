"""Losses of recovery: the next token, or what the dense model predicts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.loss import final_logits
from saap.recovery.training_text import IGNORED

LOGIT_CHUNK_ELEMENTS = 1 << 25  # 128 MiB of fp32 logits, a few times that with the teacher's and their gradient


@dataclass(frozen=True)
class Distillation:
    """How a model learns from its dense ``teacher``.

    The loss is the divergence KL(teacher || model) over the ``top_k`` tokens that the teacher finds likeliest and one
    more for all others (None: over the whole vocabulary), plus ``next_token`` times the next-token loss, plus
    ``hidden`` times the squared distance of the hidden states behind each layer over the square of the teacher's.
    """

    teacher: nn.Module
    top_k: int | None = 64
    next_token: float = 0.0
    hidden: float = 0.0


class Objective(nn.Module):
    """A model that is called for its loss: ids and labels (B, T) in, the sum over the positions that count out.

    ``plain`` asks for the next-token loss whatever the model learns from. The teacher is no part of the module.
    """

    def __init__(self, model: nn.Module, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.model = model
        self.distillation = distillation
        self._no_split_modules = getattr(causal_lm(model), "_no_split_modules", None)  # what FSDP wraps

    def forward(self, input_ids: Tensor, labels: Tensor, plain: bool = False) -> Tensor:
        return summed_loss(self.model, input_ids, labels, None if plain else self.distillation)


def causal_lm(model: Any) -> PreTrainedModel:
    """The model itself, out of peft's wrapper where it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def summed_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor, distillation: Distillation | None = None
) -> Tensor:
    """Sum of the losses of the positions whose next label counts; ids and labels (B, T); fp32 (float64 stays).

    Position t predicts label t + 1. Logits exist for ``LOGIT_CHUNK_ELEMENTS`` at a time: each chunk of positions goes
    through the output head by itself, and once more in the backward pass.
    """
    told = distillation
    learner = causal_lm(model)
    hidden = told is not None and told.hidden > 0
    counted = labels[:, 1:] != IGNORED  # [B, T - 1]
    targets = labels[:, 1:][counted]  # [R]
    mine = learner.base_model(input_ids=input_ids, use_cache=False, output_hidden_states=hidden)
    rows = mine.last_hidden_state[:, :-1][counted]  # [R, D]
    teacher, their_rows = None, None
    if told is not None:
        teacher = causal_lm(told.teacher)
        with torch.no_grad():
            theirs = teacher.base_model(input_ids=input_ids, use_cache=False, output_hidden_states=hidden)
        their_rows = theirs.last_hidden_state[:, :-1][counted]
    size = max(1, LOGIT_CHUNK_ELEMENTS // learner.config.vocab_size)
    total = torch.zeros((), dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32, device=rows.device)
    for start in range(0, max(1, len(rows)), size):
        part = slice(start, start + size)
        chunk = (rows[part], targets[part], None if their_rows is None else their_rows[part])
        if len(rows) > size and torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, learner, teacher, told, *chunk, use_reentrant=False)
        else:
            total = total + _chunk_loss(learner, teacher, told, *chunk)
    if told is not None and hidden:
        total = total + told.hidden * hidden_distance(mine.hidden_states, theirs.hidden_states, counted)
    return total


def _chunk_loss(
    learner: PreTrainedModel, teacher: PreTrainedModel | None, told: Distillation | None,
    rows: Tensor, targets: Tensor, their_rows: Tensor | None,
) -> Tensor:  # fmt: skip
    """Of rows (R, D) of hidden states before the output head, the teacher's beside them."""
    logits = final_logits(learner, learner.get_output_embeddings()(rows))  # [R, V]
    if told is None or teacher is None or their_rows is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    with torch.no_grad():
        wanted = final_logits(teacher, teacher.get_output_embeddings()(their_rows))
    loss = divergence(logits, wanted, told.top_k)
    if told.next_token:
        loss = loss + told.next_token * F.cross_entropy(logits, targets, reduction="sum")
    return loss


def divergence(logits: Tensor, teacher: Tensor, top_k: int | None) -> Tensor:
    """Sum over rows of KL(teacher || model) of logits (R, V) of both.

    With ``top_k`` below V the distributions are those over the teacher's likeliest tokens and one bucket for the rest.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        mine, theirs = F.log_softmax(logits, -1), F.log_softmax(teacher, -1)
        return F.kl_div(mine, theirs, reduction="sum", log_target=True)
    chosen = teacher.topk(top_k, -1).indices  # [R, k]
    mine, theirs = (_in_buckets(each, chosen) for each in (logits, teacher))  # [R, k + 1]
    return F.kl_div(mine, theirs, reduction="sum", log_target=True)


def _in_buckets(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities (R, k + 1) of the chosen tokens and of all others together.

    The rest is summed, not taken as 1 minus the chosen: where these are nearly all, that would be a rounding error.
    """
    rest = logits.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(-1, chosen), rest], -1), -1)


def hidden_distance(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...], counted: Tensor) -> Tensor:
    """Sum over counted positions of the mean over layers of ||h - h'||^2 / ||h'||^2.

    States (B, T, D) of the embeddings, left out, and of every layer; ``counted`` (B, T - 1) bool.
    """
    found = []
    for own, other in zip(mine[1:], theirs[1:], strict=True):
        own, other = own[:, :-1][counted], other[:, :-1][counted]  # [R, D]
        wide = torch.promote_types(own.dtype, torch.float32)
        distance = (own.to(wide) - other.to(wide)).square().sum(-1)
        found.append(distance / other.to(wide).square().sum(-1).clamp_min(1e-12))
    return torch.stack(found).mean(0).sum()


def check_tokenizers(own: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the tokenizer of a teacher gives every token the id that the model's does."""
    mine, theirs = own.get_vocab(), teachers.get_vocab()
    differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    if differing:
        raise ValueError(
            f"expected a teacher with the model's tokenizer, got another one: {len(differing)} tokens differ, "
            f"{differing[0]!r} is {mine.get(differing[0])} here and {theirs.get(differing[0])} there"
        )


def check_teacher(model: nn.Module, teacher: nn.Module, *, hidden: float = 0.0) -> None:
    """Raise ValueError unless ``teacher`` predicts the tokens of ``model``, and has its states for ``hidden``."""
    mine, theirs = causal_lm(model).config, causal_lm(teacher).config
    if mine.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"expected a teacher of the model's vocabulary of {mine.vocab_size} tokens, got one of {theirs.vocab_size}"
        )
    if hidden:
        for name in ("hidden_size", "num_hidden_layers"):
            if getattr(mine, name) != getattr(theirs, name):
                raise ValueError(
                    f"hidden states are compared layer by layer: expected a teacher with {name} {getattr(mine, name)}, "
                    f"got {getattr(theirs, name)}; use hidden=0"
                )
