"""What looks at models and machines and changes nothing: ``saap info``, ``compare``, ``eval`` and ``doctor``."""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from saap import console
from saap.cli.options import AsJson, Debug, Dtype, EvalSeqLen, Force, Model
from saap.comparison import Comparison
from saap.comparison import compare as compare_models
from saap.data import FORMS, load_documents
from saap.doctor import examine, shape_choices
from saap.evaluate import evaluate
from saap.model_info import ModelInfo, model_info
from saap.opening import open_model, open_tokenizer
from saap.pipeline import refuse_existing_file
from saap.report import REPORT_FILE
from saap.report_page import amount, setting, words


def evaluate_command(
    model: Model,
    text: Annotated[str, typer.Option(help=f"Text to evaluate on. {FORMS}")],
    against: Annotated[str | None, typer.Option(help="Another model, measured in the same run.")] = None,
    seq_len: EvalSeqLen = 2048,
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


def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, dense or pruned.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Sizes, layout, dtype and origin of a model directory, without loading its weights.

    Example: `saap info my-llama-20`
    """
    console.quiet_libraries()
    with console.user_errors(debug):
        found = model_info(folder)
        if as_json:
            console.print_json(found.to_dict())
        else:
            _print_info(found)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A model directory, dense or pruned.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The model directory to compare with it.")],
    text: Annotated[str | None, typer.Option(help=f"Also evaluate both on this text. {FORMS}")] = None,
    seq_len: EvalSeqLen = 2048,
    html: Annotated[Path | None, typer.Option(help="Also write the comparison as one HTML file.")] = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Two model directories side by side: sizes, layers that differ and, with --text, perplexity and speed.

    Example: `saap compare my-llama my-llama-20 --text heldout.jsonl --html comparison.html`
    """
    console.quiet_libraries()
    with console.user_errors(debug):
        if html is not None:
            refuse_existing_file(html, force)
        if text is not None:
            load_documents(text)
        with console.progress("evaluating", "windows", shown=text is not None) as bar:
            found = compare_models(a, b, text, seq_len=seq_len, dtype=dtype, progress=bar)
        if html is not None:
            found.save_html(html)
        if as_json:
            console.print_json(found.to_dict())
        else:
            _print_comparison(found)


def doctor(
    shapes: Annotated[
        Path | None, typer.Option(help="Also time each shape of this model directory: the library's product and ours.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say which kernel backends work here and why the others do not; with --shapes which is faster for a model.

    Example: `saap doctor --shapes my-llama-20`
    """
    console.quiet_libraries()
    found, choices = examine(), []
    with console.user_errors(debug):
        if shapes is not None:
            with console.screen.status("timing"):
                choices = list(shape_choices(shapes))
    if as_json:
        found |= {"shapes": [choice.to_dict() for choice in choices]} if shapes is not None else {}
        console.print_json(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            typer.echo(f"{name}:")
            for key, detail in value.items():
                typer.echo(f"  {key}: {detail}")
        else:
            typer.echo(f"{name}: {', '.join(value) or 'none' if isinstance(value, list) else value}")
    if choices:
        rows = [
            [f"{choice.kind} {' x '.join(map(str, choice.shape))}", str(choice.modules), str(choice.bits or "stored"),
             f"{1e3 * choice.library_seconds:.3f}", f"{1e3 * choice.kernel_seconds:.3f}", choice.choice]
            for choice in choices
        ]  # fmt: skip
        columns = ["product", "modules", "bits", "library ms", "saap ms", "faster"]
        console.print_table("one token; what saap.accelerate chooses", columns, rows)


def _print_info(found: ModelInfo) -> None:
    first = found.layers[0]
    lines = {
        "family": f"{found.family} ({found.model_class}, {found.layout} layout)",
        "parameters": f"{found.parameters:,}, of which {found.block_parameters:,} in the decoder layers",
        "hidden size": f"{first.hidden_size:,}; vocabulary {found.vocab_size:,}; positions {setting(found.positions)}",
        "weights": f"{found.dtypes}, {amount(found.weight_bytes, 'bytes')} in {found.weight_files} file(s)",
        "quantised": found.quantised or "no",
        "directory": amount(found.disk_bytes, "bytes"),
        "KV cache per token": amount(found.kv_cache_bytes_per_token, "bytes"),
        "tensor parallel": setting(found.tensor_parallel),
        "tokenizer": setting(found.tokenizer),
        "report": REPORT_FILE if found.report else "none",
        "written by": found.written_by,
    }
    if found.plan is not None:
        lines["removed"] = f"{found.plan.ratio:.2%} of all parameters, {found.plan.block_ratio:.2%} of the blocks'"
        lines["plan"] = ", ".join(
            f"{words(name)} {setting(value)}"
            for name, value in found.plan.settings.items()
            if value is not None and value is not False and value != []
        )
    for name, value in lines.items():
        typer.echo(f"{name}: {value}")
    rows, start = [], 0
    for sizes, run in groupby(found.layers):
        end = start + len(list(run)) - 1
        heads = f"{sizes.query_heads} + {sizes.kv_heads} of {sizes.head_dim}"
        width = f"{sizes.intermediate_size:,}"
        if sizes.experts:
            width = f"{width} in each of {sizes.experts} experts, {sizes.experts_per_token} per token"
        rows.append([str(start) if start == end else f"{start}-{end}", heads, width])
        start = end + 1
    console.print_table("", ["layer", "query + KV heads", "channels"], rows)


def _print_comparison(found: Comparison) -> None:
    for letter, name in zip("AB", found.names, strict=True):
        typer.echo(f"{letter}: {name}")
    console.print_table("", ["", "A", "B", "change"], [list(row) for row in found.rows()])
    differing = found.differing_layers()
    if not differing:
        typer.echo("all layers have the same sizes")
        return
    rows = [[str(index), *(f"{a:,} → {b:,}" for a, b in row)] for index, *row in differing]
    columns = ["layer", "KV heads", "channels", "experts"][: len(rows[0])]
    console.print_table("layers that differ", columns, rows)
