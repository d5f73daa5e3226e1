"""``saap plan``."""

from pathlib import Path
from typing import Annotated

import typer

from saap import console, pipeline
from saap.cli.options import (
    AllowEmpty,
    AsJson,
    Context,
    Criterion,
    Debug,
    FluctuationWeight,
    For,
    Force,
    KeepExperts,
    LatencyDevice,
    LatencyFile,
    Method,
    Multiple,
    Protect,
    RatioOf,
    ResourceName,
    TensorParallel,
    Uniform,
    search_options,
)
from saap.criteria import score
from saap.plan import Plan
from saap.results import describe_plan
from saap.search import search
from saap.statistics import Statistics


def plan(
    statistics: Annotated[Path, typer.Argument(help="A statistics file written by saap calibrate.")],
    out: Annotated[Path, typer.Option(help="The plan file, .json.")],
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the parameters, or other resource, to remove, in (0, 1); may be left out with "
            "--keep-experts, to drop experts and nothing else."
        ),
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
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn statistics into a plan: JSON that you can read, edit and apply. Needs no model.

    Without one the search cannot go by what least squares will make up for, as `saap prune --compensate least_squares`
    does.

    Example: `saap plan my-llama.stats.safetensors --ratio 0.3 --out plan.json`, then
    `saap prune my-llama --plan plan.json --out my-llama-30`
    """
    with console.user_errors(debug):
        pipeline.refuse_existing_file(out, force)
        options = search_options(
            method, fluctuation_weight, ratio_of, resource, context, latency_table, latency_device, multiple,
            protect, uniform, allow_empty, keep_experts, tensor_parallel, target,
        )  # fmt: skip
        found = search(score(Statistics.load(statistics), criterion), ratio, **options)
        found.save(out)
        if as_json:
            console.print_json({"out": str(out), **describe_plan(found)})
        else:
            _print_plan(found)


def _print_plan(plan: Plan) -> None:
    mixture = any(sizes.experts for sizes in plan.units.layers)
    rows = [
        [
            str(index),
            f"{len(layer.kv_heads)} of {sizes.kv_heads}",
            *([f"{len(layer.experts)} of {sizes.experts}"] if mixture else []),
            f"{layer.width} of {sizes.intermediate_size}",
        ]
        for index, (layer, sizes) in enumerate(zip(plan.layers, plan.units.layers, strict=True))
    ]
    columns = ["experts", "channels of each"] if mixture else ["channels"]
    title = f"removes {plan.ratio:.2%} of all parameters, {plan.block_ratio:.2%} of the blocks'"
    console.print_table(title, ["layer", "KV heads", *columns], rows)
