"""``saap recover``."""

from pathlib import Path
from typing import Annotated

import typer

from saap import console
from saap.cli.options import Debug, Force


def recover(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model directory.")],
    out: Annotated[Path, typer.Option(help="Where the recovered model goes.")],
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Tune a pruned model on text: group-wise on quantised weights, or by LoRA.

    Example: `saap recover my-llama-20 --teacher my-llama --data text.jsonl --bits 4 --rank 16 --out my-llama-20-int4`
    """
    with console.user_errors(debug):
        raise NotImplementedError
