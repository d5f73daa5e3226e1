"""The ``saap`` command: prune, calibrate, plan, eval, doctor."""

from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from saap import console, pipeline
from saap.calibrate import calibrate as measure_statistics
from saap.criteria import CRITERIA, score
from saap.data import FORMS, load_documents
from saap.distributed import process_group, refuse_ranks
from saap.doctor import examine
from saap.evaluate import evaluate
from saap.opening import open_for_calibration, open_model, open_tokenizer
from saap.plan import Plan
from saap.search import search
from saap.statistics import Statistics
from saap.stream import progress_unit

app = typer.Typer(
    help="Make a language model structurally smaller in one fast pass.\n\n"
    "Start with: saap prune MODEL --data TEXT --ratio 0.2 --out DIR",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

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
Compensate = Annotated[
    Literal["none", "bias", "least_squares"], typer.Option(help="Make up for what is removed; needs --data.")
]
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
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


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(piece) for piece in text.split(",") if piece.strip())
    except ValueError as error:
        raise ValueError(f"--protect: expected layer numbers such as 0,1,-1; got {text!r}") from error


def _batch(text: str) -> int | str:
    if text != "auto" and not text.isdigit():
        raise ValueError(f"--batch-size: expected a number or auto; got {text!r}")
    return text if text == "auto" else int(text)


def _calibration(
    samples: int, seq_len: int, batch_size: str, checkpoint: str, backend: str | None, seed: int
) -> dict[str, Any]:
    return {
        "samples": samples, "seq_len": seq_len, "batch_size": _batch(batch_size),
        "checkpoint": SWITCH[checkpoint], "backend": backend, "seed": seed,
    }  # fmt: skip


@app.command()
def prune(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Where the pruned model goes (with a sweep: one folder per ratio below it).")
    ],
    data: Data = None,
    ratio: Ratio = None,
    plan: Annotated[Path | None, typer.Option(help="Apply this plan instead of making one.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="Use saved statistics instead of calibrating.")] = None,
    save_statistics: Annotated[
        Path | None, typer.Option(help="Keep the statistics for other ratios and criteria.")
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option("--eval", help="Text to evaluate dense and pruned models on.")
    ] = None,
    criterion: Criterion = "saap",
    method: Method = "global",
    ratio_of: RatioOf = "model",
    multiple: Multiple = 32,
    protect: Protect = "",
    uniform: Uniform = False,
    compensate: Compensate = "none",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = "auto",
    checkpoint: Checkpoint = "auto",
    stream: Stream = "auto",
    stream_folder: StreamFolder = None,
    backend: Backend = None,
    seed: Seed = 0,
    layout: Annotated[
        Literal["auto", "stock", "template"], typer.Option(help="How the checkpoint is written.")
    ] = "auto",
    dtype: Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show sizes and memory, do nothing.")] = False,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Calibrate, choose what to remove, cut it out, and save a model that loads like any other.

    Example: `saap prune my-llama --data text.jsonl --ratio 0.2 --out my-llama-20 --eval heldout.jsonl`
    """
    console.quiet_libraries()
    with console.user_errors(debug):
        refuse_ranks("prune", "calibrate with torchrun, then prune with --statistics")
        options = {
            "ratio_of": ratio_of, "method": method, "multiple": multiple,
            "protect": _indices(protect), "uniform": uniform,
        }  # fmt: skip
        job = pipeline.Job(
            out, pipeline.parse_ratios(ratio, plan), data, plan, statistics, save_statistics, eval_text, criterion,
            options, _calibration(samples, seq_len, batch_size, checkpoint, backend, seed), layout, force, compensate,
        )  # fmt: skip
        job.check_files()
        with console.screen.status("loading the model"):
            loaded, streaming = open_for_calibration(model, dtype, SWITCH[stream], stream_folder)
            tokenizer = open_tokenizer(model)
        job.calibration["stream"] = streaming or False
        if dry_run:
            pipeline.report_dry_run(job.preview(loaded), as_json)
        else:
            pipeline.report(job.run(loaded, tokenizer), as_json)


@app.command()
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="The statistics file, .safetensors.")],
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = "auto",
    checkpoint: Checkpoint = "auto",
    stream: Stream = "auto",
    stream_folder: StreamFolder = None,
    backend: Backend = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure importance statistics once; every ratio, criterion and search can reuse them.

    Example: `saap calibrate my-llama --data text.jsonl --out my-llama.stats.safetensors`

    On N devices: `torchrun --nproc-per-node N -m saap calibrate ...` shares the sequences among N processes.
    """
    console.quiet_libraries()
    with console.user_errors(debug), process_group() as rank:
        pipeline.refuse_existing_file(out, force)
        load_documents(data)
        options = _calibration(samples, seq_len, batch_size, checkpoint, backend, seed)
        with console.screen.status("loading the model"):
            loaded, streaming = open_for_calibration(model, dtype, SWITCH[stream], stream_folder)
            tokenizer = open_tokenizer(model)
        with console.progress("calibrating", progress_unit(streaming), shown=rank == 0) as bar:
            found = measure_statistics(loaded, tokenizer, data, **options, stream=streaming or False, progress=bar)
        if rank:
            return
        found.save(out)
        summary = {"out": str(out), "sequences": found.sequences, "tokens": found.tokens, "family": found.units.family}
        if as_json:
            console.print_json(summary)
        else:
            typer.echo(f"{found.sequences} sequences, {found.tokens:,} tokens -> {out}")


@app.command()
def plan(
    statistics: Annotated[Path, typer.Argument(help="A statistics file written by saap calibrate.")],
    ratio: Annotated[float, typer.Option(help="Share of the parameters to remove, in (0, 1).")],
    out: Annotated[Path, typer.Option(help="The plan file, .json.")],
    criterion: Criterion = "saap",
    method: Method = "global",
    ratio_of: RatioOf = "model",
    multiple: Multiple = 32,
    protect: Protect = "",
    uniform: Uniform = False,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn statistics into a plan: JSON that you can read, edit and apply. Needs no model.

    Example: `saap plan my-llama.stats.safetensors --ratio 0.3 --out plan.json`, then
    `saap prune my-llama --plan plan.json --out my-llama-30`
    """
    with console.user_errors(debug):
        pipeline.refuse_existing_file(out, force)
        found = search(
            score(Statistics.load(statistics), criterion), ratio, ratio_of=ratio_of, method=method,
            multiple=multiple, protect=_indices(protect), uniform=uniform,
        )  # fmt: skip
        found.save(out)
        if as_json:
            console.print_json({"out": str(out), **pipeline.describe_plan(found)})
        else:
            _print_plan(found)


def _print_plan(plan: Plan) -> None:
    rows = [
        [
            str(index),
            f"{len(layer.kv_heads)} of {sizes.kv_heads}",
            f"{len(layer.channels)} of {sizes.intermediate_size}",
        ]
        for index, (layer, sizes) in enumerate(zip(plan.layers, plan.units.layers, strict=True))
    ]
    title = f"removes {plan.ratio:.2%} of all parameters, {plan.block_ratio:.2%} of the blocks'"
    console.print_table(title, ["layer", "KV heads", "channels"], rows)


@app.command("eval")
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


@app.command()
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


def main() -> NoReturn:
    """Entry point of the ``saap`` command."""
    app()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
