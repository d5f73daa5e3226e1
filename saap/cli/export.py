"""``saap export``: the same model for other runtimes."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from saap import console
from saap.cli.options import Debug, Force
from saap.data import FORMS
from saap.quantise import check_rounding, export_quantised
from saap.serving.compressed_tensors import export_compressed_tensors
from saap.serving.gguf_export import TYPES, export_gguf

BITS = {"int8": 8, "int4": 4}


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, dense or pruned.")],
    gguf: Annotated[Path | None, typer.Option(help="Write this GGUF file, for llama.cpp.")] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help=f"Of the weights in a GGUF file: {', '.join(TYPES)} (default f16).")
    ] = None,
    quantised: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Write a directory with quantised projections, for transformers and vLLM with saap."),
    ] = None,
    compressed_tensors: Annotated[
        Literal["int4"] | None,
        typer.Option(help="Write a directory in the compressed-tensors format, which needs nothing of saap."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where a directory goes.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Of a directory: weights that share scale and zero (default 32).")
    ] = None,
    rounding: Annotated[
        Literal["nearest", "clip", "gptq"] | None,
        typer.Option(
            help="Of a directory: weights go to the nearest step (default), to steps over the range that loses least, "
            "or to where the layers' outputs on --data stay (GPTQ)."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"Text for --rounding gptq. {FORMS}")] = None,
    samples: Annotated[int | None, typer.Option(help="Sequences of that text (default 128).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence (default 512).")] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a model for another runtime: a GGUF file, or a directory with quantised weights.

    Example: `saap export my-llama-20 --gguf my-llama-20.gguf --type q8_0`
    """
    console.quiet_libraries()
    notes: list[str] = []
    with console.user_errors(debug):
        if sum(each is not None for each in (gguf, quantised, compressed_tensors)) != 1:
            raise ValueError("give exactly one of --gguf FILE, --quantised int8|int4 and --compressed-tensors int4")
        if (gguf is None) == (out is None):
            raise ValueError("--out DIR goes with --quantised and --compressed-tensors, and not with --gguf FILE")
        if gguf is None and kind is not None:
            raise ValueError("--type goes with --gguf FILE")
        if gguf is not None and group_size is not None:
            raise ValueError("--group-size goes with --quantised and --compressed-tensors")
        if gguf is not None and rounding is not None:
            raise ValueError("--rounding goes with --quantised and --compressed-tensors; --type is a GGUF file's")
        check_rounding(rounding or "nearest", data)
        if rounding != "gptq" and (samples is not None or seq_len is not None):
            raise ValueError("--samples and --seq-len go with --rounding gptq")
        if gguf is not None:
            with console.progress("tensors", "tensors") as bar:
                export_gguf(folder, gguf, kind or "f16", force=force, progress=bar, tell=notes.append)
            for note in notes:
                typer.echo(f"note: {note}", err=True)
            typer.echo(f"wrote {gguf}")
            return
        assert out is not None
        write = export_compressed_tensors if quantised is None else partial(export_quantised, bits=BITS[quantised])
        with console.progress("quantising", "weights") as bar:
            write(
                folder, out, group_size=32 if group_size is None else group_size, rounding=rounding or "nearest",
                data=data, samples=128 if samples is None else samples, seq_len=512 if seq_len is None else seq_len,
                force=force, progress=bar,
            )  # fmt: skip
        typer.echo(f"wrote {out}")
