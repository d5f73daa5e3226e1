"""``saap prune``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from saap import console, pipeline, results
from saap.checkpoint import refuse_losing
from saap.cli.options import (
    SWITCH,
    AllowEmpty,
    AsJson,
    Backend,
    BatchSize,
    Checkpoint,
    Compensate,
    CompensatedScores,
    CompensationInputs,
    Context,
    Criterion,
    Data,
    Debug,
    Dtype,
    FluctuationWeight,
    For,
    Force,
    KeepExperts,
    LatencyDevice,
    LatencyFile,
    Method,
    Model,
    Multiple,
    Protect,
    Ratio,
    RatioOf,
    RecoverTokens,
    ResourceName,
    Samples,
    Seed,
    SeqLen,
    Steps,
    StepSamples,
    Stream,
    StreamFolder,
    TensorParallel,
    Uniform,
    calibration_options,
    given_command,
    refuse_beside_plan,
    search_options,
)
from saap.distributed import refuse_ranks
from saap.opening import open_for_calibration, open_tokenizer
from saap.preview import preview, report_dry_run


def prune(
    invoked: typer.Context,
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
    fluctuation_weight: FluctuationWeight = 0.5,
    ratio_of: RatioOf = "model",
    resource: ResourceName = "parameters",
    context: Context = 0,
    latency_table: LatencyFile = None,
    latency_device: LatencyDevice = None,
    multiple: Multiple = None,
    protect: Protect = "",
    uniform: Uniform = False,
    allow_empty: AllowEmpty = False,
    keep_experts: KeepExperts = None,
    tensor_parallel: TensorParallel = 1,
    target: For = None,
    compensate: Compensate = "none",
    compensation_inputs: CompensationInputs = "auto",
    compensated_scores: CompensatedScores = "auto",
    steps: Steps = 1,
    step_samples: StepSamples = None,
    recover_tokens: RecoverTokens = None,
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
    baselines: Annotated[
        str, typer.Option(help="Also evaluate what these criteria would have made, such as random,element.")
    ] = "",
    report: Annotated[bool, typer.Option(help="Write saap_report.html beside the weights.")] = True,
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
        options = search_options(
            method, fluctuation_weight, ratio_of, resource, context, latency_table, latency_device, multiple,
            protect, uniform, allow_empty, keep_experts, tensor_parallel, target,
        )  # fmt: skip
        if plan is not None:
            refuse_beside_plan(criterion, options, compensated_scores)
        job = pipeline.Job(
            out, pipeline.parse_ratios(ratio, plan), data, plan, statistics, save_statistics, eval_text, criterion,
            options, calibration_options(samples, seq_len, batch_size, checkpoint, backend, seed), layout, force,
            report=report, baselines=tuple(name.strip() for name in baselines.split(",") if name.strip()),
            compensate=compensate, steps=steps, compensation_inputs=compensation_inputs, step_samples=step_samples,
            compensated_scores=SWITCH[compensated_scores], command=given_command(invoked),
            recover_tokens=recover_tokens,
        )  # fmt: skip
        for made in job.targets().values():
            refuse_losing(made, {"model": model, "text": data, "evaluation text": eval_text, "plan": plan})
        job.check_files()
        with console.screen.status("loading the model"):
            loaded, streaming = open_for_calibration(model, dtype, SWITCH[stream], stream_folder)
            tokenizer = open_tokenizer(model)
        job.calibration["stream"] = streaming or False
        if dry_run:
            report_dry_run(preview(job, loaded), as_json)
        else:
            results.report(job.run(loaded, tokenizer), as_json)
