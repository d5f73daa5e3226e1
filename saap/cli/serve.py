"""``saap serve``."""

from pathlib import Path
from typing import Annotated

import typer

from saap import console
from saap.cli.options import Debug
from saap.serving.server import serve as serve_model


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, dense or pruned.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI clients with transformers.

    Example: `saap serve my-llama-20`
    """
    with console.user_errors(debug):
        serve_model(folder, host=host, port=port)
