"""Options that several commands share, and how their text is read."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from saap.card import told_name
from saap.criteria import CRITERIA
from saap.data import FORMS
from saap.latency import LatencyTable
from saap.resources import Bytes, Latency, Macs, Resource
from saap.serving.targets import TARGETS, target_named

Model = Annotated[str, typer.Argument(help="A Hugging Face model directory (dense or pruned) or a hub name.")]
Data = Annotated[str | None, typer.Option(help=f"Calibration text. {FORMS}")]
Ratio = Annotated[
    str | None, typer.Option(help="Share of the parameters to remove, in (0, 1); 0.1,0.2,0.3 is a sweep.")
]
Criterion = Annotated[
    str,
    typer.Option(
        help=f"How units are scored: {', '.join(CRITERIA)}. llm_pruner and its _second, _mixed and _vector are "
        "LLM-Pruner's --taylor param_first, param_second, param_mix and vectorize."
    ),
]
Method = Annotated[
    Literal["global", "standardised", "fluctuation", "uniform"],
    typer.Option(
        help="One ranking by score per saved resource, by z-scores (FLAP's), by those of importance less its "
        "fluctuation, or the same share in every layer."
    ),
]
RatioOf = Annotated[Literal["model", "blocks"], typer.Option(help="What the ratio is a share of.")]
Multiple = Annotated[
    int | None,
    typer.Option(
        help="Kept MLP widths are multiples of this; of experts a multiple of 8. Default: 32, or what --for asks."
    ),
]
Protect = Annotated[str, typer.Option(help="Layers left alone, such as 0,1,-1.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="The same sizes in every layer: saves as a stock model.")]
FluctuationWeight = Annotated[
    float, typer.Option(help="Of --method fluctuation: how much z(fluctuation) counts against z(importance).")
]
AllowEmpty = Annotated[bool, typer.Option("--allow-empty", help="Whole attentions and MLPs may go.")]
KeepExperts = Annotated[
    int | None,
    typer.Option(
        help="Of a mixture of experts: every layer first drops all but so many experts, those of the highest "
        "router-weighted importance; the rest of the ratio comes from heads and channels."
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        help="So many devices must be able to share every layer of the pruned model: kept sizes are those that they "
        "can split, as vLLM does."
    ),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="|".join(TARGETS),
        help="The runtime that the pruned model is for: sets multiples and what may stay so that it takes every layer. "
        "Beside --plan: refuse the plan unless it does.",
    ),
]
ResourceName = Annotated[
    Literal["parameters", "macs", "bytes", "latency"],
    typer.Option("--resource", help="What the ratio is counted in; latency needs --latency-table."),
]
Context = Annotated[int, typer.Option(help="Tokens in the cache, for macs and bytes.")]
LatencyFile = Annotated[
    Path | None,
    typer.Option("--latency-table", help="Made by python -m benchmarks.latency_table on the target device."),
]
LatencyDevice = Annotated[
    str | None,
    typer.Option(help="The device that the latency table must be of, instead of this machine; any: whatever it is."),
]
Compensate = Annotated[
    Literal["none", "bias", "least_squares"],
    typer.Option(help="Make up for what is removed by a bias or new weights of o and down; needs --data."),
]
CompensationInputs = Annotated[
    Literal["auto", "dense", "pruned"],
    typer.Option(
        help="What new weights are solved on: inputs of the pruned model (three passes, mostly better) or of the dense "
        "one (one pass). auto: pruned for least_squares, but dense for mixtures of experts."
    ),
]
CompensatedScores = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(
        help="Search by what least squares cannot make up for (one more pass). auto: with least_squares, for "
        "criterion saap and the methods global and uniform, if there are 40 tokens of text for every input of the "
        "widest o or down."
    ),
]
Steps = Annotated[int, typer.Option(help="Prune in so many steps, calibrating again after each; needs --data.")]
StepSamples = Annotated[
    int | None,
    typer.Option(
        help="Calibration sequences of each step after the first, new ones, added to what is left of the statistics "
        "before (default: as many as the first, from nothing)."
    ),
]
RecoverTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of --data, shared equally by the steps, on which the model is tuned after each: LoRA, merged into "
        "its weights, on what the dense model predicts (pip install 'saap[recover]')."
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
EvalSeqLen = Annotated[int, typer.Option("--seq-len", help="Window length; cut to the model's positions.")]
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


def layer_indices(text: str) -> tuple[int, ...]:
    """ "0,1,-1" -> (0, 1, -1)."""
    try:
        return tuple(int(piece) for piece in text.split(",") if piece.strip())
    except ValueError as error:
        raise ValueError(f"--protect: expected layer numbers such as 0,1,-1; got {text!r}") from error


def _batch_size(text: str) -> int | str:
    if text != "auto" and not text.isdigit():
        raise ValueError(f"--batch-size: expected a number or auto; got {text!r}")
    return text if text == "auto" else int(text)


def calibration_options(
    samples: int, seq_len: int, batch_size: str, checkpoint: str, backend: str | None, seed: int
) -> dict[str, Any]:
    """Keyword arguments of ``saap.calibrate`` from the command line's text."""
    return {
        "samples": samples, "seq_len": seq_len, "batch_size": _batch_size(batch_size),
        "checkpoint": SWITCH[checkpoint], "backend": backend, "seed": seed,
    }  # fmt: skip


def search_options(
    method: str, fluctuation_weight: float, ratio_of: str, resource: str, context: int, latency_table: Path | None,
    latency_device: str | None, multiple: int | None, protect: str, uniform: bool, allow_empty: bool,
    keep_experts: int | None, tensor_parallel: int, target: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments of ``saap.search`` from the command line's text."""
    if target is not None:
        target_named(target)
    return {
        "method": method, "fluctuation_weight": fluctuation_weight, "ratio_of": ratio_of,
        "resource": _resource(resource, context, latency_table, latency_device), "multiple": multiple,
        "protect": layer_indices(protect), "uniform": uniform, "allow_empty": allow_empty,
        "keep_experts": keep_experts, "tensor_parallel": tensor_parallel, "target": target,
    }  # fmt: skip


def refuse_beside_plan(criterion: str, options: dict[str, Any], compensated_scores: str = "auto") -> None:
    """Raise ValueError for choices that a given plan has made already; ``options`` as of ``search_options``.

    A target is no choice: the plan is checked for it.
    """
    defaults = search_options(
        "global", 0.5, "model", "parameters", 0, None, None, None, "", False, False, None, 1, None
    )
    given = [name for name, value in options.items() if name != "target" and value != defaults[name]]
    given += ["criterion"] if criterion != "saap" else []
    given += ["compensated_scores"] if compensated_scores != "auto" else []
    if given:
        named = ", ".join("--" + name.replace("_", "-") for name in sorted(given))
        raise ValueError(f"a --plan says already what stays; expected no {named} beside it")


def _resource(name: str, context: int, table: Path | None, device: str | None) -> str | Resource:
    if (name == "latency") != (table is not None):
        raise ValueError(f"--resource latency and --latency-table go together; got {name} and {table}")
    if device is not None and table is None:
        raise ValueError("--latency-device says of which device a --latency-table must be; got no table")
    if context and name not in ("macs", "bytes"):
        raise ValueError(f"--context is for --resource macs or bytes; got {name}")
    if table is not None:
        return Latency(LatencyTable.load(table, device or "this"))
    kinds: dict[str, Resource] = {"macs": Macs(context), "bytes": Bytes(context=context)}
    return kinds.get(name, name)


UNTOLD = ("out", "force", "as_json", "debug", "report", "dry_run", "stream_folder", "save_statistics", "resume")


def given_names(context: typer.Context) -> set[str]:
    """Names of the parameters that are on the command line, whatever they say."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def given_command(context: typer.Context) -> str:
    """The command that is running, as it was given, without what says nothing about its result and without folders."""
    pieces, given = ["saap", str(context.info_name)], given_names(context)
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in given or name in UNTOLD:
            continue
        value = context.params[name]
        if parameter.param_type_name == "argument":
            pieces.append(told_name(str(value)))
        elif isinstance(value, bool):
            pieces.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            pieces += [max(parameter.opts, key=len), told_name(str(value))]
    return shlex.join(pieces)
