"""``saap check``."""

from pathlib import Path
from typing import Annotated

import typer

from saap import console
from saap.cli.options import AsJson, Debug


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, dense or pruned.")],
    target: Annotated[str, typer.Option("--for", help="The runtime to check for.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say whether a runtime takes the sizes of a model, and why not.

    Example: `saap check my-llama-20 --for llama.cpp`
    """
    with console.user_errors(debug):
        raise NotImplementedError
