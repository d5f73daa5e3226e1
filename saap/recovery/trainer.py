"""transformers' Trainer for recovery: its losses, checkpoints of what learns alone, and a stop where a loss is none."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from saap.recovery.distillation import Distillation, divergence, hidden_distance, next_token_loss
from saap.recovery.settings import Settings
from saap.recovery.training_text import IGNORED, TrainingText

LEARNED = "learned.safetensors"


@dataclass(frozen=True)
class Evaluated:
    """Of held-out text after ``step`` steps: mean next-token loss."""

    step: int
    loss: float


@dataclass(frozen=True)
class History:
    """``losses`` of every step, by the objective; ``evaluations``; ``best`` is the step whose parameters were taken."""

    losses: list[float]
    evaluations: list[Evaluated]
    best: int
    stopped_early: bool
    tokens: int  # trained on, with repetitions
    seconds: float


def train(
    model: nn.Module,
    text: TrainingText,
    held_out: TrainingText | None,
    settings: Settings,
    *,
    folder: Path,
    teacher: nn.Module | None = None,
    resume: bool = False,
    progress: Callable[[int, int], Any] | None = None,
    said: Callable[[int, float], Any] | None = None,
) -> History:
    """Train what requires grad in ``model``; checkpoints, settings and what is learned are kept in ``folder``."""
    raise NotImplementedError


class NotFinite(RuntimeError):
    """A training loss that is NaN or infinite."""


class RecoveryTrainer(Trainer):
    """Trains what requires grad in a model; ``distillation`` None: on the next token.

    Checkpoints hold these parameters, not the model. ``said(step, loss)`` hears every step's loss.
    """

    def __init__(
        self,
        *args: Any,
        distillation: Distillation | None = None,
        said: Callable[[int, float], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation, self.said = distillation, said
        self.model_accepts_loss_kwargs = True  # losses here are sums over the tokens of the whole step

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        labels = inputs["labels"]
        told = self.distillation
        hidden = told is not None and told.hidden > 0
        outputs = model(input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=hidden)
        if told is None or not model.training:
            total = next_token_loss(outputs.logits, labels)
        else:
            with torch.no_grad():
                wanted = told.teacher(input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=hidden)
            total = divergence(outputs.logits, wanted.logits, labels, told.top_k)
            if told.next_token:
                total = total + told.next_token * next_token_loss(outputs.logits, labels)
            if hidden:
                total = total + told.hidden * hidden_distance(outputs.hidden_states, wanted.hidden_states, labels)
        count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        value = float(loss)
        if not math.isfinite(value):
            raise NotFinite(f"the loss of step {self.state.global_step + 1} is {value}")
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in learned(self.model).items()}, folder / LEARNED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_learned(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            restore_learned(self.model, Path(self.state.best_model_checkpoint))


def learned(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of the parameters that require grad."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_learned(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's parameters into those of the model; ValueError where names or shapes differ."""
    saved, mine = load_file(folder / LEARNED), learned(model)
    described = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (mine, saved)]
    if described[0] != described[1]:
        differing = sorted(dict(described[0].items() ^ described[1].items()))
        raise ValueError(f"{folder}: expected the parameters that learn here, got others: {', '.join(differing[:3])}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(saved[name])


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a training directory: its state, which is written last, can be read."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda each: int(each.name.rpartition("-")[2]), reverse=True)
    return next(filter(_whole, found), None)


def _whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return os.path.isfile(checkpoint / LEARNED)
