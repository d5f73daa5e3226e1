"""Training of a recovery, in one process or in those that torchrun starts."""

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from saap.distributed import check_agreement, gathered, on_first_rank, process_group, world_size
from saap.recovery.distillation import Distillation, Objective, causal_lm, check_teacher
from saap.recovery.fingerprint import frozen_fingerprint, weights_fingerprint
from saap.recovery.history import History, Log, out_of_patience
from saap.recovery.schedule import Schedule, order_of
from saap.recovery.settings import Settings
from saap.recovery.training_folder import (
    PREFIX,
    Record,
    last_checkpoint,
    learned,
    open_folder,
    read_log,
    restore_learned,
    step_of,
)
from saap.recovery.training_text import TrainingText

if TYPE_CHECKING:
    from transformers import TrainingArguments


def train(
    model: nn.Module,
    text: TrainingText,
    held_out: TrainingText | None,
    settings: Settings,
    *,
    folder: str | os.PathLike[str],
    teacher: nn.Module | None = None,
    resume: bool = False,
    finish: bool = False,
    lasting: bool = True,
    progress: Callable[[int, int], Any] | None = None,
    said: Callable[[int, float], Any] | None = None,
) -> History:
    """Train what requires grad in ``model``, a transformers model or peft's wrapper of one, in place.

    Its best parameters on ``held_out`` are left in it, those that it came with among them; without such text the last.
    ``folder`` keeps what the training is (``settings.json``) and its last and best checkpoints, each with the learned
    parameters, not the model, and all that the optimizer and the schedule need; ``resume`` goes on from the last: on a
    CPU with the same losses, bit for bit. ``finish`` trains no further and takes the best of the checkpoints there,
    of a training that stopped on its way. A folder that is not ``lasting`` is gone afterwards: nothing is told of going
    on from it, and weights are not hashed to know them again, which takes a second per GiB. ``progress(done, total)``
    and ``said(step, loss)`` hear of every step.

    Under torchrun each process trains on its part of every batch, and the gradients are averaged; with accelerate's
    FSDP (``accelerate launch --use_fsdp --fsdp_version 2``) a copy of the model is sharded, and the model itself stays
    where it is. Only the first process writes. The teacher is moved to the device of training, whole in each process.

    Raises, before anything is trained or written: ValueError for a model in which nothing learns, a teacher that does
    not fit, a batch or budget that cannot be, a resume of another training (listing the differences), and processes
    that disagree; FileExistsError for a folder with something in it, FileNotFoundError for a resume without one, or a
    finish without a checkpoint;
    RuntimeError without accelerate. While it trains: RuntimeError where a loss, gradient or parameter is not finite,
    and OSError where a checkpoint cannot be written; the last good checkpoint stays. KeyboardInterrupt passes, with a
    message that says how to go on.
    """
    if find_spec("accelerate") is None:
        raise RuntimeError("training needs accelerate: pip install 'saap[recover]'")
    refuse_sharding(next(model.parameters()).device)
    target = Path(folder)
    with process_group(), _quiet():
        distillation = _distillation(model, teacher, settings)
        schedule = Schedule.of(settings, len(text), world_size())
        hashed = lasting or world_size() > 1  # several processes compare theirs
        record = _record(model, text, held_out, settings, distillation, hashed)
        check_agreement(_flat(record))
        checkpoint = on_first_rank(lambda: open_folder(target, record, resume, finish))
        if finish and checkpoint is not None:
            return _taken(model, read_log(checkpoint), settings, schedule, target)
        try:
            return _trained(
                model, text, held_out, settings, schedule, distillation, target, checkpoint, lasting, progress, said
            )
        except KeyboardInterrupt:
            if not lasting:
                raise
            last = last_checkpoint(target)
            kept = f"resume (--resume) goes on from {last.name} in {target}" if last else "nothing is lost"
            raise KeyboardInterrupt(f"interrupted; {kept}") from None


def asks_for_fsdp() -> bool:
    """Whether ``accelerate launch`` was told to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def refuse_sharding(device: torch.device) -> None:
    """Raise ValueError for FSDP of the first version, and where accelerate would leave FSDP out without a word."""
    if not asks_for_fsdp():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "the first version of FSDP joins parameters that learn with those that do not: launch with --fsdp_version 2"
        )
    if device.type == "cpu" and not torch.cuda.is_available():
        raise ValueError("FSDP shards a model over GPUs, and there is none: launch without --use_fsdp")


def _distillation(model: nn.Module, teacher: nn.Module | None, settings: Settings) -> Distillation | None:
    if not learned(model):
        raise ValueError("expected a model with parameters that require grad, got one in which nothing learns")
    if settings.objective == "distillation" and teacher is None:
        raise ValueError("objective distillation: expected a teacher, got none")
    if teacher is None or settings.objective == "next_token":
        return None
    check_teacher(model, teacher, hidden=settings.hidden_weight)
    return Distillation(teacher, settings.top_k, settings.next_token, settings.hidden_weight)


def _record(
    model: nn.Module, text: TrainingText, held_out: TrainingText | None, settings: Settings,
    distillation: Distillation | None, hashed: bool,
) -> Record:  # fmt: skip
    """What a resumed training, and all processes of one, must have in common."""
    return {
        "settings": settings.to_dict(),
        "text": text.fingerprint,
        "held_out_text": None if held_out is None else held_out.fingerprint,
        "learns": {name: list(tensor.shape) for name, tensor in learned(model).items()},
        "frozen_weights": frozen_fingerprint(model) if hashed else None,
        "teacher": weights_fingerprint(distillation.teacher) if hashed and distillation is not None else None,
    }


def _flat(record: Record) -> Record:
    """With the settings one by one, so that a difference names one."""
    return {**{f"setting {name}": value for name, value in record["settings"].items()}, **record, "settings": None}


def _trained(
    model: nn.Module, text: TrainingText, held_out: TrainingText | None, settings: Settings, schedule: Schedule,
    distillation: Distillation | None, folder: Path, checkpoint: Path | None, lasting: bool,
    progress: Callable[[int, int], Any] | None, said: Callable[[int, float], Any] | None,
) -> History:  # fmt: skip
    from saap.recovery import training_loop as loop

    log = [] if checkpoint is None else read_log(checkpoint)
    step = 0 if checkpoint is None else step_of(checkpoint)
    if step < schedule.steps and not out_of_patience(log, settings.patience):
        sharded = asks_for_fsdp()
        learner = copy.deepcopy(model) if sharded else model  # FSDP takes a model apart for good
        objective, args = Objective(learner, distillation), _arguments(learner, settings, schedule, folder)
        with _training_mode(learner, settings.gradient_checkpointing):
            if distillation is not None:
                distillation.teacher.to(args.device).eval()
            if world_size() > 1 and not sharded:
                args.ddp_find_unused_parameters = _some_are_unused(objective.to(args.device), text)
            trainer = loop.RecoveryTrainer(
                objective,
                args,
                text,
                order_of(len(text), schedule.steps * settings.batch_size, settings.seed),
                held_out,
                every=schedule.every, patience=settings.patience, lasting=lasting, progress=progress, said=said,
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        log = trainer.state.log_history
        gathered(None)  # the first process has written
    return _taken(model, log, settings, schedule, folder)


def _taken(model: nn.Module, log: Log, settings: Settings, schedule: Schedule, folder: Path) -> History:
    """The best of the parameters that were kept, in ``model``."""
    history = History.of(log, schedule.steps, settings.batch_size * settings.seq_len, settings.patience)
    restore_learned(model, folder / f"{PREFIX}{history.best}")
    gathered(None)  # before the first process may remove what the others read
    return history


def _some_are_unused(objective: Objective, text: TrainingText) -> bool:
    """Whether a parameter that learns gets no gradient, in any process: waiting for it, the others would hang."""
    device = next(objective.parameters()).device
    objective.train()(text.input_ids[:1].to(device), text.labels[:1].to(device)).backward()
    unused = any(each.requires_grad and each.grad is None for each in objective.parameters())
    objective.zero_grad(set_to_none=True)
    return any(gathered(unused))


def _arguments(model: nn.Module, settings: Settings, schedule: Schedule, folder: Path) -> "TrainingArguments":
    from transformers import TrainingArguments

    device, width = next(model.parameters()).device, causal_lm(model).config.hidden_size
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.micro_batch,
        gradient_accumulation_steps=schedule.accumulation,
        learning_rate=settings.rate(width),
        warmup_steps=math.ceil(settings.warmup * schedule.steps),
        optim="adamw_torch",
        weight_decay=0.0,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the loop stops there
        eval_strategy="no",  # the loop decides when, as for checkpoints
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=settings.seed,
        use_cpu=device.type == "cpu" and not asks_for_fsdp(),
        dataloader_pin_memory=device.type != "cpu",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # quantised weights are buffers, and equal in all processes
    )
    if device.type == "cuda" and world_size() == 1:
        args._n_gpu = 1  # all visible GPUs otherwise, by torch's DataParallel
    return args


@contextmanager
def _training_mode(model: nn.Module, gradient_checkpointing: bool) -> Iterator[None]:
    """The model as it was afterwards: out of training mode, without checkpoints."""
    was, inner = model.training, causal_lm(model)
    if gradient_checkpointing:
        if hasattr(inner, "activation_checkpointing_enable"):  # its name in later versions of transformers
            inner.activation_checkpointing_enable()
        else:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.disable_input_require_grads()  # what that asks for, and checkpoints that are not reentrant do not need
    try:
        yield
    finally:
        if gradient_checkpointing:
            disable = getattr(inner, "activation_checkpointing_disable", None)
            (disable or inner.gradient_checkpointing_disable)()
        model.train(was)
        model.zero_grad(set_to_none=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notices of transformers and accelerate; errors come through."""
    before, accelerate = transformers_logging.get_verbosity(), logging.getLogger("accelerate")
    level = accelerate.level
    transformers_logging.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # by the torch of 2.13, not of 2.8
            yield
    finally:
        transformers_logging.set_verbosity(before)
        accelerate.setLevel(level)
