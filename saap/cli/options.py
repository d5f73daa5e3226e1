"""Options that several commands share, and how their text is read."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from saap.criteria import CRITERIA
from saap.data import FORMS

Model = Annotated[str, typer.Argument(help="A Hugging Face model directory (dense or pruned) or a hub name.")]
Data = Annotated[str | None, typer.Option(help=f"Calibration text. {FORMS}")]
Ratio = Annotated[
    str | None, typer.Option(help="Share of the parameters to remove, in (0, 1); 0.1,0.2,0.3 is a sweep.")
]
Criterion = Annotated[str, typer.Option(help=f"How units are scored: {', '.join(CRITERIA)}.")]
Method = Annotated[
    Literal["global", "uniform"], typer.Option(help="One ranking over all layers, or the same share in each.")
]
RatioOf = Annotated[Literal["model", "blocks"], typer.Option(help="What the ratio is a share of.")]
Multiple = Annotated[int, typer.Option(help="Kept MLP widths are multiples of this.")]
Protect = Annotated[str, typer.Option(help="Layers left alone, such as 0,1,-1.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="The same sizes in every layer: saves as a stock model.")]
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
EvalSeqLen = Annotated[int, typer.Option("--seq-len", help="Window length; cut to the model's positions.")]
BatchSize = Annotated[str, typer.Option(help="Sequences per micro-batch, or auto.")]
Checkpoint = Annotated[Literal["auto", "on", "off"], typer.Option(help="Recompute activations to save memory.")]
Stream = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="Bring one block at a time onto the device: for models larger than it."),
]
StreamFolder = Annotated[
    Path | None, typer.Option(help="Where streaming keeps hidden states, instead of memory or a temporary folder.")
]
Backend = Annotated[str | None, typer.Option(help="Kernel backend; see saap doctor.")]
Seed = Annotated[int, typer.Option(help="Order of the calibration documents.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Load (with --stream: compute) in float32, bfloat16 or float16 instead of the saved dtype."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

SWITCH: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}


def layer_indices(text: str) -> tuple[int, ...]:
    """ "0,1,-1" -> (0, 1, -1)."""
    try:
        return tuple(int(piece) for piece in text.split(",") if piece.strip())
    except ValueError as error:
        raise ValueError(f"--protect: expected layer numbers such as 0,1,-1; got {text!r}") from error


def _batch_size(text: str) -> int | str:
    if text != "auto" and not text.isdigit():
        raise ValueError(f"--batch-size: expected a number or auto; got {text!r}")
    return text if text == "auto" else int(text)


def calibration_options(
    samples: int, seq_len: int, batch_size: str, checkpoint: str, backend: str | None, seed: int
) -> dict[str, Any]:
    """Keyword arguments of ``saap.calibrate`` from the command line's text."""
    return {
        "samples": samples, "seq_len": seq_len, "batch_size": _batch_size(batch_size),
        "checkpoint": SWITCH[checkpoint], "backend": backend, "seed": seed,
    }  # fmt: skip
