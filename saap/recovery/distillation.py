"""Losses of recovery: the next token, or what the dense model predicts."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saap.recovery.training_text import IGNORED

OBJECTIVES = ("next_token", "distillation")


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


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of labels (B, T) under logits (B, T, V), fp32; position t predicts label t + 1."""
    rows, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(rows.float(), targets, ignore_index=IGNORED, reduction="sum")


def divergence(logits: Tensor, teacher: Tensor, labels: Tensor, top_k: int | None) -> Tensor:
    """Sum of KL(teacher || model) over the positions whose next label counts; logits (B, T, V) of both."""
    counted = labels[:, 1:] != IGNORED
    mine, theirs = (F.log_softmax(each[:, :-1][counted].float(), -1) for each in (logits, teacher))  # [rows, V]
    if top_k is None or top_k >= mine.shape[-1]:
        return F.kl_div(mine, theirs, log_target=True, reduction="sum")
    theirs, chosen = theirs.topk(top_k, -1)
    mine = mine.gather(-1, chosen)
    likely = (theirs.exp() * (theirs - mine)).sum()
    rest, other = _log_of_rest(theirs), _log_of_rest(mine)
    return likely + (rest.exp() * (rest - other)).sum()


def hidden_distance(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Sum over counted positions of the mean over layers of ||h - h'||^2 / ||h'||^2; states (B, T, D) each."""
    counted = labels != IGNORED
    found = torch.stack(
        [
            (a[counted] - b[counted]).float().square().sum(-1) / b[counted].float().square().sum(-1).clamp_min(1e-12)
            for a, b in zip(mine[1:], theirs[1:], strict=True)
        ]
    )
    return found.mean(0).sum()


def _log_of_rest(logs: Tensor) -> Tensor:
    """log(1 - sum of exp(logs)) of log-probabilities (rows, k), kept off log 0 by the rounding of that sum."""
    return torch.log1p(-logs.exp().sum(-1).clamp(max=1 - 1e-6))
