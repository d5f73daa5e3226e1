"""What ``saap recover`` does: open, tune, evaluate and save one model."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap import console
from saap.card import Made, comparisons, hub_name
from saap.checkpoint import refuse_existing, refuse_losing, save
from saap.checkpoint_files import plan_in
from saap.data import check_tokenizer, load_documents
from saap.distributed import launched
from saap.evaluate import Evaluation, evaluate
from saap.memory import weight_bytes
from saap.opening import open_model, open_tokenizer
from saap.plan import Plan
from saap.recovery.checked_folder import check_folder
from saap.recovery.distillation import check_tokenizers
from saap.recovery.recover import (
    Recovered,
    Told,
    check_budget,
    check_models,
    tune,
)
from saap.recovery.report import described_recovery, recovery_rows
from saap.recovery.settings import Settings
from saap.recovery.split_text import few_held_out, texts
from saap.recovery.training_folder import PREFIX, SETTINGS, UNFINISHED, last_checkpoint, step_of
from saap.recovery.training_text import TrainingText
from saap.report import REPORT_FILE, drawn_into, shown_name
from saap.stopwatch import Stopwatch
from saap.units import elements

TRAINING = ".training"  # behind the name of the model's directory: its checkpoints while it is trained
OURS = (SETTINGS, PREFIX, UNFINISHED, f".{SETTINGS}")  # how the names begin of what is in such a folder
Ready = tuple[
    PreTrainedModel, PreTrainedTokenizerBase | None, PreTrainedModel | None, TrainingText, TrainingText | None
]
UNITS = {"quantising": "modules", "training": "steps"}


@dataclass(frozen=True)
class Job:
    """Everything ``saap recover`` was asked for; ``held_out`` as of ``saap.recover``, ``settings`` are settled."""

    folder: str
    out: Path
    data: str
    settings: Settings
    teacher: str | None = None
    held_out: Any = None
    eval_text: str | None = None
    dtype: str | None = None
    resume: bool = False
    report: bool = True
    force: bool = False
    command: str = ""
    finish: bool = False

    @property
    def training(self) -> Path:
        """Where checkpoints are kept until the model is saved."""
        return self.out.with_name(self.out.name + TRAINING)

    @property
    def _starts_anew(self) -> bool:
        """Whether checkpoints of an earlier training are to be removed."""
        return self.force and not (self.resume or self.finish)

    def check_files(self) -> None:
        """Everything that can be refused without loading a model."""
        if not Path(self.folder).is_dir():
            raise FileNotFoundError(f"no such model directory: {self.folder}")
        if self.teacher is not None and Path(self.teacher).resolve() == Path(self.folder).resolve():
            raise ValueError(f"--teacher: expected the dense model, got the one to tune itself: {self.teacher}")
        read = {"training text": self.data, "held-out text": self.held_out, "evaluation text": self.eval_text}
        refuse_losing(self.out, {"model": self.folder, "teacher": self.teacher} | read)
        refuse_existing(self.out, self.force)
        if self._starts_anew:
            _check_ours(self.training)
        else:
            check_folder(self.training, self.resume, self.settings.to_dict(), self.finish)
        for text in read.values():
            if isinstance(text, str):
                load_documents(text)

    def run(self) -> "Done | None":
        """Do the work; None in all processes but the first, if torchrun started several.

        The output directory appears complete or not at all; checkpoints beside it are removed then.
        """
        first, watch = launched()[0] == 0, Stopwatch()
        model, tokenizer, teacher, text, kept = self._ready()
        if self._starts_anew and first:
            shutil.rmtree(self.training, ignore_errors=True)
        before = self._evaluated(model, tokenizer, teacher, watch) if first else None
        with _bars(first) as told:
            found = tune(model, text, kept, self.settings, teacher, self.training, self.resume, told, self.finish)
        if not first:
            return None
        for stage, seconds in found.timings.items():
            watch.seconds[stage] = seconds
        done = self._saved(found, tokenizer, self._evaluated(found.model, tokenizer, before, watch), watch)
        shutil.rmtree(self.training, ignore_errors=True)
        return done

    def preview(self) -> dict[str, Any]:
        """What ``run`` would do, after all that it checks before it trains."""
        model, _, _, text, kept = self._ready()
        steps = check_budget(text, self.settings)
        if self.finish and (there := last_checkpoint(self.training)) is not None:
            steps = step_of(there)
        settings = self.settings.to_dict() | {"learning_rate": self.settings.rate(model.config.hidden_size)}
        last = last_checkpoint(self.training) if self.finish else None
        told = {name: value for name, value in settings.items() if value is not None}
        return told | ({} if last is None else {"finishes_from": last.name}) | {
            "parameters": elements(model),
            "weight_bytes": weight_bytes(model),
            "sequences": len(text),
            "held_out_sequences": 0 if kept is None else len(kept),
            "steps": steps,
            "tokens": steps * self.settings.batch_size * self.settings.seq_len,
            "checkpoints": str(self.training),
            "outputs": [str(self.out)],
        }  # fmt: skip

    def _ready(self) -> Ready:
        """Everything that is needed, checked."""
        with console.screen.status("loading"):
            model, tokenizer, teacher = self._open()
        check_models(model, teacher, self.settings)
        if tokenizer is None:
            raise ValueError(
                f"expected a tokenizer in {self.folder}, found none: copy the dense model's into it, or give "
                "--teacher, whose tokenizer serves too"
            )
        check_tokenizer(model, tokenizer)
        text, kept = texts(model, tokenizer, self.data, self.held_out, self.settings)
        check_budget(text, self.settings)
        if launched()[0] == 0:
            self._tell(text, kept)
        return model, tokenizer, teacher, text, kept

    def _tell(self, text: TrainingText, kept: TrainingText | None) -> None:
        """How much text there is, and how much of it is held out."""
        found, few = 0 if kept is None else len(kept), few_held_out(kept, self.held_out)
        told = [f"{len(text):,} sequences of {self.settings.seq_len} tokens to train on, {found:,} held out"]
        told += [] if few is None else [f"warning: {few}"]
        for line in told:
            console.screen.print(line, markup=False, highlight=False, soft_wrap=True)

    def _open(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, PreTrainedModel | None]:
        if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        model, tokenizer = open_model(self.folder, self.dtype), open_tokenizer(self.folder)
        if self.teacher is None:
            return model, tokenizer, None
        other = open_tokenizer(self.teacher)
        if tokenizer is not None and other is not None:
            check_tokenizers(tokenizer, other)
        return model, other if tokenizer is None else tokenizer, open_model(self.teacher, self.dtype)

    def _evaluated(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None,
        against: PreTrainedModel | Evaluation | None, watch: Stopwatch,
    ) -> Evaluation | None:  # fmt: skip
        if self.eval_text is None:
            return None
        with console.progress("evaluating", "windows") as bar, watch("evaluate"):
            return evaluate(model, tokenizer, self.eval_text, against=against, progress=bar)

    def _saved(
        self, found: Recovered, tokenizer: PreTrainedTokenizerBase | None, evaluation: Evaluation | None,
        watch: Stopwatch,
    ) -> "Done":  # fmt: skip
        plan = plan_in(Path(self.folder))
        rows = recovery_rows(found, None if self.teacher is None else shown_name(self.teacher))
        base = self.teacher if self.teacher is not None and hub_name(self.teacher) else self.folder
        told = tuple(rows.items())
        made = Made(base, self.data, "", self.command, evaluation, self.eval_text, recovery=told)
        also = partial(self._report, found, plan, evaluation, watch) if self.report else None
        with console.screen.status("saving"), watch("save"):
            save(found.model, self.out, tokenizer=tokenizer, force=self.force, plan=plan, also=also, made=made)
        report = self.out / REPORT_FILE
        return Done(self, found, evaluation, report if report.exists() else None, watch.seconds)

    def _report(
        self, found: Recovered, plan: Plan | None, evaluation: Evaluation | None, watch: Stopwatch, folder: Path
    ) -> None:
        """Add the report to a checkpoint that is being saved."""
        held_out = self.held_out if isinstance(self.held_out, str) else None
        files = {"training": self.data, "held out": held_out, "teacher": self.teacher, "evaluation": self.eval_text}
        failure = drawn_into(
            folder,
            lambda: described_recovery(
                shown_name(self.folder), found, plan, evaluation, watch.so_far(),
                {name: file for name, file in files.items() if file},
            ),
        )  # fmt: skip
        if failure is not None:
            console.screen.print(f"the model is saved without its report: {failure}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Done:
    """One recovered model on disk; ``evaluation`` is against the pruned model's, and that against the dense one's."""

    job: Job
    recovered: Recovered
    evaluation: Evaluation | None
    report: Path | None
    timings: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        history = self.recovered.history
        return {
            "out": str(self.job.out),
            "settings": self.recovered.settings.to_dict(),
            "sequences": self.recovered.sequences,
            "held_out_sequences": self.recovered.held_out,
            "steps": len(history.losses),
            "tokens": history.tokens,
            "losses": history.losses,
            "evaluations": [{"step": each.step, "loss": each.loss} for each in history.evaluations],
            "best_step": history.best,
            "planned_steps": history.planned,
            "stopped_early": history.stopped_early,
            "cut_short": history.cut_short,
            "evaluation": self.evaluation and self.evaluation.to_dict(),
            "timings": self.timings,
            "report": self.report and str(self.report),
        }

    def print(self, as_json: bool) -> None:
        """One JSON document, or tables and what was made."""
        if as_json:
            console.print_json(self.to_dict())
            return
        found = comparisons(self.evaluation)[::-1]
        if found:
            names = ["dense", Path(self.job.folder).name, self.job.out.name][-len(found) :]
            rows = [console.evaluation_row(name, each) for name, each in zip(names, found, strict=True)]
            console.print_table(f"windows of {found[0].seq_len} tokens", console.EVALUATION_HEADER, rows)
        teacher = None if self.job.teacher is None else shown_name(self.job.teacher)
        print(f"{self.job.out}: recovered")
        for name, value in recovery_rows(self.recovered, teacher).items():
            print(f"  {name}: {value}")
        if self.report is not None:
            print(f"  what happened to it: {self.report}")


def _check_ours(folder: Path) -> None:
    """Raise FileExistsError where a folder to be replaced holds what no training of ours writes."""
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else [] if not folder.exists() else [""]
    others = sorted(name for name in names if not name.startswith(OURS))
    if others:
        raise FileExistsError(f"{folder} is no folder of checkpoints: it holds {others[0] or 'no directory'}")


@contextmanager
def _bars(shown: bool) -> Iterator[Told]:
    """A bar for each stage of a recovery, with the live loss in its title."""
    with ExitStack() as stack:
        bars: list[console.Bar] = []

        def begin(stage: str) -> None:
            stack.close()
            bars[:] = [stack.enter_context(console.progress(stage, UNITS[stage], shown))]

        yield Told(
            progress=lambda done, total: bars[0](done, total),
            said=lambda step, loss: bars[0].say(f"training, loss {loss:.4g}"),
            stage=begin,
        )
