"""What ``saap prune --dry-run`` says: sizes and memory, without doing anything."""

from typing import Any

import torch
from transformers import PreTrainedModel

from saap import console
from saap.compensate import refuse_experts
from saap.memory import available_bytes, weight_bytes
from saap.micro_batches import fit_micro_batches
from saap.pipeline import Job
from saap.resources import Resource, named_resource
from saap.search import check_ratio
from saap.stream import Streaming, streamed_bytes
from saap.units import Units, discover


def preview(job: Job, model: PreTrainedModel) -> dict[str, Any]:
    """Sizes and memory of a job; raises the ValueError of a ratio that cannot be reached."""
    units = discover(model)
    refuse_experts(units, job.compensate, job.compensation_inputs)
    for ratio in job.ratios:
        check_ratio(units, ratio, **job.search_options)
    job.check_target(model.config)
    _resource(job).warn_of_dtype(model.dtype)
    options, stream = job.calibration, job.calibration.get("stream")
    device, dtype, streamed = model.device, model.dtype, None
    if isinstance(stream, Streaming):
        device, dtype = stream.resolved_device(model), stream.dtype or dtype
        streamed = streamed_bytes(model, dtype)
    fit = fit_micro_batches(
        units, options["samples"], options["seq_len"], dtype, device,
        batch_size=options["batch_size"], checkpoint=options["checkpoint"], streamed_bytes=streamed,
        one_pass=job.coupled,
    )  # fmt: skip
    return {
        "family": units.family,
        "layers": len(units.layers),
        "parameters": units.total_parameters,
        "block_parameters": units.block_parameters,
        "kv_heads": units.count("attention"),
        "channels": units.count("mlp"),
        **({"experts": units.expert_offsets()[-1]} if units.expert_offsets()[-1] else {}),
        "weight_bytes": weight_bytes(model),
        "batch_size": fit.batch,
        "checkpointing": fit.recompute,
        "activation_bytes": fit.activation_bytes,
        "available_bytes": available_bytes(device),
        "resource": _resource(job).unit,
        "would_remove": {f"{r:g}": _share(job, units, r) for r in job.ratios},
        **({"recover_tokens": job.recover_tokens} if job.recover_tokens else {}),
        "outputs": [str(path) for path in job.targets().values()],
    }


def _share(job: Job, units: Units, ratio: float) -> float:
    """What a ratio would remove at least, in the resource that it is of."""
    amount = ratio * _resource(job).whole(units, job.search_options["ratio_of"])
    return amount if _resource(job).unit == "latency" else int(amount)


def _resource(job: Job) -> Resource:
    return named_resource(job.search_options.get("resource", "parameters"))


def report_dry_run(preview: dict[str, Any], as_json: bool) -> None:
    """Print a preview without having done anything."""
    if as_json:
        console.print_json(preview)
        return
    for name, value in preview.items():
        print(f"{name.replace('_', ' ')}: {_shown(name, value)}")
    threads = torch.get_num_threads()
    print(f"nothing was done; {threads} {'thread' if threads == 1 else 'threads'} would work")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(name, each)}" for key, each in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
