"""``saap serve``."""

from pathlib import Path
from typing import Annotated

import typer

from saap import console
from saap.cli.options import Debug
from saap.serving.server import serve as serve_model


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, dense or pruned.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model, instead of DIR's name.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 instead of the saved dtype.")] = None,
    accelerate: Annotated[bool, typer.Option("--accelerate", help="Run the model on SAAP's kernels.")] = False,
    bits: Annotated[int | None, typer.Option(help="With --accelerate: quantise to 8 or 4 bits in memory.")] = None,
    debug: Debug = False,
) -> None:
    """Serve one model to OpenAI clients: completions and chat, streamed or whole.

    Example: `saap serve my-llama-20`
    """
    console.quiet_libraries()
    with console.user_errors(debug):
        serve_model(
            folder, host=host, port=port, name=name, dtype=dtype, accelerate=accelerate, bits=bits,
            say=console.announce,
        )  # fmt: skip
