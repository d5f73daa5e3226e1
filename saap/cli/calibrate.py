"""``saap calibrate``."""

from pathlib import Path
from typing import Annotated

import typer

from saap import console, pipeline
from saap.calibrate import calibrate as measure_statistics
from saap.calibrate import check_coupled
from saap.cli.options import (
    SWITCH,
    AsJson,
    Backend,
    BatchSize,
    Checkpoint,
    Data,
    Debug,
    Dtype,
    Force,
    Model,
    Samples,
    Seed,
    SeqLen,
    Stream,
    StreamFolder,
    calibration_options,
)
from saap.data import load_documents
from saap.distributed import process_group
from saap.opening import open_for_calibration, open_tokenizer
from saap.stream import progress_unit


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
    coupled: Annotated[
        bool,
        typer.Option(
            "--coupled",
            help="Also measure what llm_pruner, llm_pruner_mixed and llm_pruner_vector read: one backward pass over "
            "all samples, in one process; takes more memory.",
        ),
    ] = False,
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
        options = calibration_options(samples, seq_len, batch_size, checkpoint, backend, seed) | {"coupled": coupled}
        if coupled:
            check_coupled(samples, options["batch_size"])
        load_documents(data)
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
