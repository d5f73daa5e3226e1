"""``saap recover``."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from saap import console
from saap.cli.options import AsJson, Debug, Dtype, Force, given_command, given_names
from saap.data import FORMS
from saap.preview import report_dry_run
from saap.recovery.job import Job
from saap.recovery.recover import settled
from saap.recovery.settings import HIDDEN, LEARNING_RATES, MEASURED, Settings, asked_for, refuse_rounding
from saap.recovery.split_text import HELD_OUT

DEFAULT = Settings()
RATES = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
Method = Literal["groupwise", "lora", "full"]
METHOD = (
    "groupwise: quantise, and learn zero points, levels and norms, all merged exactly; lora: LoRA through peft, merged "
    "into 16-bit weights; full: every weight."
)
HELD = (
    "Text to evaluate while training, whose best step's parameters are taken, or the share of the sequences of --data "
    f"(whole ones, from their end) to hold out for that; 0: none, and the last step's are taken. Default: {HELD_OUT}."
)


def recover(
    invoked: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model directory, or a dense one.")],
    data: Annotated[str, typer.Option(help=f"Text to train on. {FORMS}")],
    out: Annotated[Path, typer.Option(help="Where the recovered model goes.")],
    teacher: Annotated[
        str | None, typer.Option(help="The dense model, to learn what it predicts and to evaluate it.")
    ] = None,
    method: Annotated[Method, typer.Option(help=METHOD)] = "groupwise",
    bits: Annotated[
        int | None, typer.Option(help="Of weights: 4, 8, or 16 for no quantisation. Default: 4 for groupwise, else 16.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights of a row that share scale and zero: 32, 64 or 128.")] = 32,
    rounding: Annotated[
        Literal["nearest", "clip", "gptq"],
        typer.Option(help="How weights are quantised: to the nearest level, in searched ranges, or GPTQ."),
    ] = "gptq",
    rank: Annotated[
        int, typer.Option(help="Of what LoRA or levels learn; of zero points at most their groups.")
    ] = DEFAULT.rank,
    alpha: Annotated[float, typer.Option(help="Adapters are scaled by alpha / rank.")] = DEFAULT.alpha,
    levels: Annotated[bool, typer.Option(help="Of groupwise: learn levels too, not zero points alone.")] = True,
    norms: Annotated[bool, typer.Option(help="Of groupwise: learn the norms' weights too.")] = True,
    objective: Annotated[
        Literal["auto", "distillation", "next_token"],
        typer.Option(help="auto: distillation where there is a --teacher, which next_token leaves alone."),
    ] = "auto",
    top_k: Annotated[
        int, typer.Option(help="Of distillation: the teacher's likeliest tokens, one by one; 0: all tokens.")
    ] = 64,
    next_token: Annotated[float, typer.Option(help="Of distillation: weight of the next-token loss beside it.")] = 0.0,
    hidden: Annotated[
        float | None,
        typer.Option(help=f"Of distillation: weight of the distance of hidden states (default {HIDDEN:g})."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Times that the text is read.")] = DEFAULT.epochs,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on at most, repeated ones too.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = DEFAULT.seq_len,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = DEFAULT.batch_size,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences at once, a divisor of --batch-size.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"Of AdamW, at its largest. Default: {RATES}, times {MEASURED} / hidden size for wider models."
        ),
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the learning rate rises.")
    ] = DEFAULT.warmup,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations to save memory.")
    ] = False,
    held_out: Annotated[str | None, typer.Option(metavar="TEXT|SHARE", help=HELD)] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations and checkpoints. Default: ten in all.")
    ] = None,
    patience: Annotated[int, typer.Option(help="Stop after so many evaluations without a better one; 0: never.")] = 3,
    seed: Annotated[int, typer.Option(help="Order of the text, and what is drawn at random.")] = 0,
    eval_text: Annotated[
        str | None, typer.Option("--eval", help="Text to evaluate dense (--teacher), pruned and recovered model on.")
    ] = None,
    dtype: Dtype = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.training, by the same settings.")
    ] = False,
    finish: Annotated[
        bool,
        typer.Option(
            "--finish",
            help="Train no further: take the best step of the checkpoints in OUT.training, by the same settings.",
        ),
    ] = False,
    report: Annotated[bool, typer.Option(help="Write saap_report.html beside the weights.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, show steps and sizes, do nothing.")] = False,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tune a pruned model on text: group-wise on quantised weights, by LoRA, or every weight.

    Checkpoints are kept in OUT.training until the model is saved, whole, in OUT. `torchrun --nproc-per-node N -m saap
    recover ...` trains on several devices.

    Example: `saap recover my-llama-20 --teacher my-llama --data text.jsonl --bits 4 --rank 16 --out my-llama-20-int4`
    """
    console.quiet_libraries()
    with console.user_errors(debug):
        if bits not in (None, 4, 8, 16):
            raise ValueError(f"--bits: expected 4, 8 or 16; got {bits}")
        asked: dict[str, Any] = {
            "method": method, "group_size": group_size, "rounding": rounding, "rank": rank, "alpha": alpha,
            "levels": levels, "norms": norms, "objective": objective, "top_k": top_k or None,
            "next_token": next_token, "hidden": hidden, "epochs": epochs, "tokens": tokens, "seq_len": seq_len,
            "batch_size": batch_size, "micro_batch": micro_batch, "learning_rate": learning_rate, "warmup": warmup,
            "gradient_checkpointing": gradient_checkpointing, "evaluate_every": evaluate_every,
            "patience": patience or None, "seed": seed,
        }  # fmt: skip
        asked |= {} if bits is None else {"bits": None if bits == 16 else bits}
        given = given_names(invoked)
        asked = {name: value for name, value in asked.items() if name in given}  # the others have their defaults
        held = _held_out(held_out)
        settings = settled(asked, teacher is not None, held)
        refuse_rounding(asked_for(asked), _quantisation(folder))
        job = Job(
            str(folder), out, data, settings, teacher, held, eval_text, dtype, resume, report, force,
            given_command(invoked), finish,
        )  # fmt: skip
        job.check_files()
        if dry_run:
            report_dry_run(job.preview(), as_json)
            return
        done = job.run()
        if done is not None:
            done.print(as_json)


def _quantisation(folder: Path) -> Any:
    """How the weights of a model directory are quantised, as far as that can be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError):  # of which loading it tells
        return None


def _held_out(text: str | None) -> str | float | None:
    """A share, or the name of a text."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text
