"""``saap export``: the same model for other runtimes."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from saap import console
from saap.cli.options import Debug, Force
from saap.quantise import export_quantised
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
        group = 32 if group_size is None else group_size
        if gguf is not None:
            with console.progress("tensors", "tensors") as bar:
                export_gguf(folder, gguf, kind or "f16", force=force, progress=bar, tell=notes.append)
            for note in notes:
                typer.echo(f"note: {note}", err=True)
            written = gguf
        else:
            assert out is not None
            if quantised is not None:
                bits = BITS[quantised]
                with console.progress("quantising", "weights") as bar:
                    export_quantised(folder, out, bits=bits, group_size=group, force=force, progress=bar)
            else:
                with console.progress("quantising", "weights") as bar:
                    export_compressed_tensors(folder, out, group_size=group, force=force, progress=bar)
            written = out
        typer.echo(f"wrote {written}")
