"""What looks at models and machines and changes nothing: ``saap eval`` and ``saap doctor``."""

from pathlib import Path
from typing import Annotated

import typer

from saap import console
from saap.cli.options import AsJson, Debug, Dtype, Model
from saap.data import FORMS, load_documents
from saap.doctor import examine
from saap.evaluate import evaluate
from saap.opening import open_model, open_tokenizer


def evaluate_command(
    model: Model,
    text: Annotated[str, typer.Option(help=f"Text to evaluate on. {FORMS}")],
    against: Annotated[str | None, typer.Option(help="Another model, measured in the same run.")] = None,
    seq_len: Annotated[int, typer.Option(help="Window length; cut to the model's positions.")] = 2048,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Perplexity, size, KV cache, speed and a sample of text; with --against two models side by side.

    Example: `saap eval my-llama-20 --text heldout.jsonl --against my-llama`
    """
    console.quiet_libraries()
    with console.user_errors(debug):
        load_documents(text)
        with console.screen.status("loading"):
            loaded, tokenizer = open_model(model, dtype), open_tokenizer(model)
            other = None if against is None else open_model(against, dtype)
        with console.progress("evaluating", "windows") as bar:
            result = evaluate(loaded, tokenizer, text, seq_len=seq_len, against=other, progress=bar)
        if as_json:
            console.print_json(result.to_dict())
            return
        rows = [] if result.against is None else [console.evaluation_row(Path(against or "").name, result.against)]
        rows.append(console.evaluation_row(Path(model).name, result))
        console.print_table(f"windows of {result.seq_len} tokens", console.EVALUATION_HEADER, rows)


def doctor(as_json: AsJson = False) -> None:
    """Say which kernel backends work here and why the others do not."""
    found = examine()
    if as_json:
        console.print_json(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            typer.echo(f"{name}:")
            for key, detail in value.items():
                typer.echo(f"  {key}: {detail}")
        else:
            typer.echo(f"{name}: {', '.join(value) or 'none' if isinstance(value, list) else value}")
