"""transformers' Trainer for recovery: its losses, checkpoints of what learns alone, and a stop where a loss is none.

Imported where training starts: it needs accelerate.
"""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from saap.distributed import gathered, rank, sum_over_ranks, world_size
from saap.recovery import sharded
from saap.recovery.distillation import Objective
from saap.recovery.history import best_step, out_of_patience
from saap.recovery.schedule import rise_and_fall
from saap.recovery.training_folder import (
    UNFINISHED,
    finish_checkpoint,
    last_checkpoint,
    learned,
    restore_learned,
    save_learned,
    step_of,
)
from saap.recovery.training_text import IGNORED, TrainingText


class NotFinite(RuntimeError):
    """A loss, a gradient or a parameter that is NaN or infinite."""


class RecoveryTrainer(Trainer):
    """Trains what requires grad in an ``Objective``'s model, on sequences in the ``order`` that is given.

    ``order`` holds the numbers of the sequences of all steps: the loop has one epoch, whatever the text has.
    Checkpoints hold these parameters, not the model; they are ``lasting`` if errors are to tell of them.
    ``progress(done, total)`` and ``said(step, loss)`` hear of every step, on the first process; nothing is printed.
    """

    def __init__(
        self,
        objective: Objective,
        args: TrainingArguments,
        text: TrainingText,
        order: list[int],
        held_out: TrainingText | None,
        *,
        every: int,
        patience: int | None,
        lasting: bool = True,
        progress: Callable[[int, int], Any] | None = None,
        said: Callable[[int, float], Any] | None = None,
    ) -> None:
        self.lr_scheduler: Any
        self.control: TrainerControl
        super().__init__(model=objective, args=args, callbacks=[_Flow(self, every, patience, progress, said)])
        self.remove_callback(PrinterCallback)
        self.objective, self.folder, self.lasting = objective, Path(args.output_dir), lasting
        self.text, self.order, self.held_out = text, order, held_out
        self.model_accepts_loss_kwargs = True  # losses here are sums over the tokens of the whole step
        self.started, self.writing = time.monotonic(), False

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        data = Subset(self.text, self.order)
        loader = DataLoader(
            data, self.args.train_batch_size, sampler=SequentialSampler(data), collate_fn=_collate,
            pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]  # gives each process its batches

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        if self.lr_scheduler is None:
            share = rise_and_fall(int(self.args.warmup_steps), num_training_steps)
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # out of accelerate's wrapper
            self.lr_scheduler = LambdaLR(optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """The micro-batch's part of the mean over all tokens that the step counts, in all processes."""
        total = model(inputs["input_ids"], inputs["labels"])
        assert num_items_in_batch is not None  # there are labels
        loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        loss = loss.float() * self.accelerator.num_processes  # gradients are averaged over the processes
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean next-token loss of the held-out text, over its tokens."""
        assert self.held_out is not None
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        batches = [slice(start, start + self.batch) for start in range(0, len(self.held_out), self.batch)]
        for first in range(0, len(batches), world_size()):
            number = first + rank()
            # every process runs as often as the others, whose weights it may hold: one without text repeats the first
            part = batches[number] if number < len(batches) else batches[0]
            ids, labels = (each[part].to(self.args.device) for each in (self.held_out.input_ids, self.held_out.labels))
            total = self.model(ids, labels, plain=True)
            if number < len(batches):
                sums += torch.stack([total.double(), (labels[:, 1:] != IGNORED).sum().double()])
        sum_over_ranks(sums)
        self.model.train(training)
        metrics = {"eval_loss": float(sums[0] / sums[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def batch(self) -> int:
        return int(self.args.train_batch_size)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step = self.state.global_step
        for name, what in (("loss", "loss of"), ("grad_norm", "gradient of"), ("eval_loss", "held-out loss after")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise NotFinite(self._stopped(f"the {what} step {step} is {logs[name]}"))
        if "loss" in logs:
            logs["seconds"] = time.monotonic() - self.started
        super().log(logs, start_time)

    def _stopped(self, reason: str) -> str:
        if not self.lasting:
            return f"training stopped: {reason}"
        last = last_checkpoint(self.folder)
        if last is None:
            return f"training stopped: {reason}; there is no checkpoint before it"
        best = best_step(self.state.log_history, step_of(last))
        return (
            f"training stopped: {reason}; the last good checkpoint is {last}. A resume would meet the same: finish "
            f"(--finish), with all else as it was, makes the model from step {best} without training on"
        )

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / UNFINISHED if self.writing else self.folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside the others and give it its name when it is whole, or raise on every process."""
        step = self.state.global_step
        bad = next(filter(None, gathered(sharded.not_finite(self.model))), None)
        if bad:
            raise NotFinite(self._stopped(f"{bad[0]} is not finite after step {step}"))
        if rank() == 0:
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
        gathered(None)  # nobody writes before that
        reason = self._written(lambda: Trainer._save_checkpoint(self, model, trial))
        if reason is None and rank() == 0:
            best = best_step(self.state.log_history, step)
            reason = self._written(lambda: finish_checkpoint(self.folder, step, best), alone=True)
        reason = next(filter(None, gathered(reason)), None)
        if reason is not None:
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
            last = last_checkpoint(self.folder)
            kept = f"{last.name} is whole and stays" if last else "there is none before it"
            raise OSError(f"cannot write the checkpoint of step {step} in {self.folder}: {reason}; {kept}")

    def _written(self, write: Callable[[], Any], alone: bool = False) -> str | None:
        """Why ``write`` failed, in any process unless this one is ``alone``."""
        reason, self.writing = None, True
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's errors
            reason = str(error)
        finally:
            self.writing = False
        return reason if alone else next(filter(None, gathered(reason)), None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        tensors = sharded.gather_learned(self.model) if self.is_fsdp_enabled else learned(self.objective.model)
        if self.args.should_save:
            save_learned(tensors, Path(output_dir or self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        started = self.state.global_step > 0
        sharded.save_optimizer(self.model, self.optimizer, Path(output_dir), self.args.should_save, started)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            sharded.spread_learned(self.model, Path(resume_from_checkpoint))
        else:
            restore_learned(self.objective.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """By way of the CPU: transformers' own asks for a place "cpu:0", which torch has not, in several processes."""
        if checkpoint is None:
            return
        if self.is_fsdp_enabled:
            sharded.load_optimizer(self.model, self.optimizer, Path(checkpoint))
        else:
            assert self.optimizer is not None
            file = Path(checkpoint, OPTIMIZER_NAME)
            if self.state.global_step or file.exists():  # before the first step there is nothing in it
                self.optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))


class _Flow(TrainerCallback):
    """When the trainer evaluates, writes a checkpoint and stops, and who hears of it."""

    def __init__(
        self, trainer: RecoveryTrainer, every: int, patience: int | None,
        progress: Callable[[int, int], Any] | None, said: Callable[[int, float], Any] | None,
    ) -> None:  # fmt: skip
        self.trainer, self.every, self.patience = trainer, every, patience
        self.progress, self.said = (progress, said) if rank() == 0 else (None, None)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        before = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.trainer.started = time.monotonic() - (before[-1] if before else 0.0)
        if last_checkpoint(self.trainer.folder) is None:  # what there is to lose: the model as it came may be the best
            if self.trainer.held_out is not None:
                self.trainer.evaluate()
            self.trainer._save_checkpoint(self.trainer.model, None)
        if self.progress:
            self.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            control.should_save = True
            control.should_evaluate = self.trainer.held_out is not None
        if self.progress:
            self.progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if self.said and "loss" in logs:
            self.said(state.global_step, logs["loss"])

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if out_of_patience(state.log_history, self.patience):
            control.should_training_stop = True


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, in which the first label of a sequence, which nothing predicts, is not counted."""
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    labels[:, 0] = IGNORED
    return {"input_ids": ids, "labels": labels}
