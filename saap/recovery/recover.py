"""``saap.recover``: quantise, attach what learns, train, merge."""

import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.compact import PLAN_ATTRIBUTE
from saap.data import check_tokenizer
from saap.distributed import launched
from saap.families import family_of
from saap.packed_mlp import is_accelerated
from saap.quantised_linear import is_quantised
from saap.recovery.checked_folder import check_folder
from saap.recovery.distillation import check_teacher
from saap.recovery.history import History
from saap.recovery.schedule import Schedule
from saap.recovery.settings import Settings, asked_for, refuse_rounding, refuse_unused
from saap.recovery.split_text import few_held_out, texts
from saap.recovery.training_folder import kept_if_it_fails
from saap.recovery.training_text import TrainingText
from saap.refuse import refuse_meta, refuse_nonfinite_weights, refuse_unsupported
from saap.stopwatch import Stopwatch
from saap.undo import Undo

Progress = Callable[[int, int], Any]
PACKAGES = {"groupwise": ("accelerate",), "lora": ("accelerate", "peft"), "full": ("accelerate",)}
ROUNDING_SAMPLES = 128  # sequences that rounding by "gptq" looks at


@dataclass(frozen=True)
class Recovered:
    """The model, merged and quantised, and how its training went.

    ``sequences`` were trained on and ``held_out`` ones of the same length evaluated; ``timings`` are seconds by stage.
    """

    model: PreTrainedModel
    settings: Settings
    history: History
    sequences: int
    held_out: int
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """Who hears how a recovery goes on: ``stage`` that one begins, ``progress`` its work, ``said`` each step's loss."""

    progress: Progress | None = None
    said: Callable[[int, float], Any] | None = None
    stage: Callable[[str], Any] | None = None

    def begin(self, stage: str) -> None:
        if self.stage is not None:
            self.stage(stage)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Any,
    *,
    teacher: PreTrainedModel | None = None,
    held_out: Any = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    finish: bool = False,
    progress: Progress | None = None,
    said: Callable[[int, float], Any] | None = None,
    stage: Callable[[str], Any] | None = None,
    **settings: Any,
) -> Recovered:
    """Tune a pruned ``model`` on ``data``, in place; ``settings`` are those of ``Settings``, and so are their defaults;
    those that the method or the objective does not read are refused unless they are None.

    Without ``bits`` those are 4 for method "groupwise", and None for the others. A model that is quantised already, to
    the bits and groups asked for, is tuned as it is. ``teacher`` is the dense model for distillation, in eval mode and
    frozen meanwhile; objective "next_token" leaves it alone. ``held_out`` is text (any form ``data`` may have), or the
    share of the sequences of ``data``, rounded to whole ones and taken from their end, that is evaluated instead of
    trained on; 0: none, None: 5 %, but at least 16 of them, or a quarter where that is less; a warning tells of fewer.
    ``folder`` keeps checkpoints, and ``resume`` goes on from the last one there; without it they are temporary, and
    stay only where training fails, whose error says where. ``finish`` trains no further: it merges the best parameters
    kept there (without held-out text the last), of a training that stopped on its way.
    ``stage`` hears what begins, "quantising" and "training", of which ``progress(done, total)`` counts the Linears or
    blocks and the steps, and ``said(step, loss)`` each step's loss.

    Raises ValueError, FileNotFoundError or FileExistsError with nothing changed for settings, text, a tokenizer or
    models that do not fit, and for a ``folder`` that does not; RuntimeError for packages that are not installed.
    A model whose training fails is left with what was attached to it: load it again, and go on with ``resume``,
    or with ``finish`` where it would fail again.
    """
    wanted = settled(settings, teacher is not None, held_out)
    check_models(model, teacher, wanted)
    refuse_rounding(asked_for(settings), is_quantised(model))
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    check_folder(folder, resume, wanted.to_dict(), finish)
    text, kept = texts(model, tokenizer, data, held_out, wanted)
    check_budget(text, wanted)
    few = few_held_out(kept, held_out)
    if few is not None:
        warnings.warn(few, stacklevel=2)
    with kept_if_it_fails() if folder is None else nullcontext(folder) as checkpoints:
        told = Told(progress, said, stage)
        return tune(model, text, kept, wanted, teacher, checkpoints, resume, told, finish)


def settled(settings: dict[str, Any], has_teacher: bool, held_out: Any = None) -> Settings:
    """The settings that are asked for, with all that depends on others decided; errors as ``recover``."""
    method = settings.get("method", "groupwise")
    wanted = Settings.from_dict({"bits": 4 if method == "groupwise" else None} | settings)
    absent = [name for name in PACKAGES[wanted.method] if find_spec(name) is None]
    if absent:
        raise RuntimeError(f"recovery by {wanted.method} needs {' and '.join(absent)}: pip install 'saap[recover]'")
    objective = wanted.objective
    if objective == "auto":
        objective = "distillation" if has_teacher else "next_token"
    if objective == "distillation" and not has_teacher:
        raise ValueError("objective distillation follows a dense teacher: expected teacher (--teacher), got none")
    wanted = replace(wanted, objective=objective)
    refuse_unused(asked_for(settings), wanted, has_teacher, held_out)
    return replace(wanted, hidden=wanted.hidden_weight)


def check_models(model: PreTrainedModel, teacher: PreTrainedModel | None, settings: Settings) -> None:
    """Raise ValueError unless ``model`` can be tuned by ``settings``, and ``teacher`` can teach it."""
    refuse_unsupported(model, quantised=True)
    refuse_meta(model)
    _check_positions(model, "the model", settings.seq_len)
    from saap.recovery.attach import refuse_other_quantisation

    if is_quantised(model):
        refuse_other_quantisation(model, settings)
    else:
        refuse_nonfinite_weights(model, family_of(model))
    if settings.method == "groupwise":
        _check_ranks(model, settings)
    if teacher is not None:
        _check_teacher(model, teacher, settings)


def _check_ranks(model: PreTrainedModel, settings: Settings) -> None:
    from saap.recovery.attach import decoder_linears, refuse_rank

    linears = {name: model.get_submodule(name) for name in decoder_linears(model)}
    if linears:
        refuse_rank(cast("dict[str, nn.Linear]", linears), settings)


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, settings: Settings) -> None:
    if teacher is model:
        raise ValueError("teacher: expected another model than the one to tune: the dense one it was made from")
    refuse_unsupported(teacher, accelerated=True)
    refuse_meta(teacher)
    if not (is_accelerated(teacher) or is_quantised(teacher)):  # whose weights were checked when they became so
        try:
            refuse_nonfinite_weights(teacher, family_of(teacher))
        except ValueError as error:
            raise ValueError(f"teacher: {error}") from error
    _check_positions(teacher, "the teacher", settings.seq_len)
    check_teacher(model, teacher, hidden=settings.hidden_weight)


def _check_positions(model: PreTrainedModel, name: str, seq_len: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise ValueError(f"seq_len: expected at most the {positions} positions of {name}, got {seq_len}")


def check_budget(text: TrainingText, settings: Settings) -> int:
    """The steps to train; ValueError for none, or for batches that the processes of torchrun cannot share."""
    return Schedule.of(settings, len(text), launched()[1]).steps


@torch.inference_mode(False)
def tune(
    model: PreTrainedModel, text: TrainingText, held_out: TrainingText | None, settings: Settings,
    teacher: PreTrainedModel | None, folder: str | os.PathLike[str], resume: bool, told: Told, finish: bool = False,
    lasting: bool = True,
) -> Recovered:  # fmt: skip
    """``recover`` of what its checks have passed; ``lasting`` as of ``train``."""
    from saap.recovery.attach import attach  # what they need is not needed by others
    from saap.recovery.trainer import train

    watch, plan = Stopwatch(), getattr(model, PLAN_ATTRIBUTE, None)
    with ExitStack() as stack:
        if settings.bits is not None and not is_quantised(model):
            told.begin("quantising")
            with watch("quantise"):
                _quantise(model, text, settings, told.progress)
        undo = Undo()
        stack.callback(undo.restore)
        teacher = teacher if settings.objective == "distillation" else None
        if teacher is not None:
            undo.eval_mode(teacher)
            undo.freeze(teacher.parameters())
        attached = attach(model, settings)
        if not finish:
            told.begin("training")
        with watch("train"):
            history = train(
                attached.model, text, held_out, settings, folder=folder, teacher=teacher, resume=resume,
                finish=finish, lasting=lasting, progress=told.progress, said=told.said,
            )  # fmt: skip
        with watch("merge"):
            done = attached.finish().eval()
    if plan is not None:
        object.__setattr__(done, PLAN_ATTRIBUTE, plan)
    settings = replace(settings, learning_rate=settings.rate(done.config.hidden_size))
    return Recovered(done, settings, history, len(text), 0 if held_out is None else len(held_out), watch.seconds)


def _quantise(model: PreTrainedModel, text: TrainingText, settings: Settings, progress: Progress | None) -> None:
    from saap.quantise import quantise

    assert settings.bits is not None  # or there is nothing to quantise
    options: dict[str, Any] = {"rounding": settings.rounding}
    if settings.rounding == "gptq":
        options |= {"data": text.input_ids[:ROUNDING_SAMPLES], "samples": min(ROUNDING_SAMPLES, len(text))}
        options |= {"seq_len": settings.seq_len, "seed": settings.seed}
    quantise(model, bits=settings.bits, group_size=settings.group_size, progress=progress, **options)
