"""Whether a runtime takes a model directory as it is, why not, and what to do: by configuration and file headers."""

import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saap.model_info import ModelInfo, model_info
from saap.serving.targets import (
    BLOCKS,
    GGUF_TYPES,
    TARGETS,
    Target,
    config_fault,
    for_type,
    model_fault,
    target_named,
)
from saap.size_rules import allowed_counts
from saap.stored_weight import METHOD
from saap.tensor_parallel import check_devices, described, shareable, size_of, splits
from saap.units import MODULES, LayerUnits

GGUF = "--gguf"
K_BLOCK = 256  # of K-quants
NAMES = {"attention": "attention", "mlp": "MLP"}
IN_PART = {"attention": "o", "mlp": "down"}  # its rows are what is left of the module


@dataclass(frozen=True)
class Finding:
    """One thing that a target does not take, or, if it is no ``fault``, takes at a cost. ``layer`` None: the model."""

    layer: int | None
    part: str
    found: str
    needed: str
    remedy: str
    fault: bool = True


@dataclass(frozen=True)
class Check:
    """What was found about a model directory and a target; ``command`` runs the model there."""

    target: str
    title: str
    findings: tuple[Finding, ...]
    command: str
    needs: tuple[str, ...]

    @property
    def valid(self) -> bool:
        return not any(finding.fault for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"target": self.target, "title": self.title, "valid": self.valid} | {
            "findings": [asdict(finding) for finding in self.findings],
            "command": self.command,
            "needs": list(self.needs),
        }


def check(
    path: str | os.PathLike[str], target: str, *, tensor_parallel: int = 1, type: str | None = None
) -> Check:  # fmt: skip
    """Whether ``target`` takes the model directory ``path``, dense or pruned, on ``tensor_parallel`` devices.

    ``type`` asks for weights of one type there, such as "q8_0", "q4_k" or "int4". Raises ValueError for targets, types
    and numbers of devices that are unknown, and the errors of ``saap.model_info.model_info`` for what is no model
    directory, or a damaged one.
    """
    row = target_named(target)
    check_devices(tensor_parallel)
    if type is not None:
        for_type(row, type)
    return check_info(model_info(path), row, tensor_parallel, type)


def check_all(path: str | os.PathLike[str], *, tensor_parallel: int = 1) -> list[Check]:
    """``check`` for every target."""
    check_devices(tensor_parallel)
    info = model_info(path)
    return [check_info(info, target, tensor_parallel, None) for target in TARGETS.values()]


def check_info(info: ModelInfo, target: Target, devices: int, kind: str | None) -> Check:
    """``check`` of a directory that has been read."""
    asked = target if kind is None else for_type(target, kind)
    findings = [*_of_model(info, asked), *_of_files(info, asked, devices)]
    for index, sizes in enumerate(info.layers):
        for module in MODULES:
            findings += _of_module(info, asked, devices, kind, index, sizes, module)
    findings += _at_a_cost(info, asked, kind)
    command = _command(info, target, devices, kind)
    needs = TARGETS["llama.cpp"].needs if GGUF in command else target.needs
    needs = tuple(_with_installed(need) for need in needs)
    if GGUF not in command:
        needs += _needs_of_files(info)
    return Check(target.name, target.title, tuple(findings), command, needs)


def _needs_of_files(info: ModelInfo) -> tuple[str, ...]:
    """What has to be installed for the layout and the weights of a directory."""
    if info.quantisation is not None and info.quantisation.method == METHOD:
        return ("saap beside it",)  # its kernels
    needs = ("saap beside it, or trust_remote_code",) if info.layout == "template" else ()
    return needs if info.quantisation is None else (*needs, _with_installed(info.quantisation.method))


def _of_model(info: ModelInfo, target: Target) -> Iterator[Finding]:
    alike = len({(layer.intermediate_size, layer.experts) for layer in info.layers}) == 1
    of_sizes = model_fault(target, info.units, uniform=info.uniform, alike=alike)
    for fault in (of_sizes, config_fault(target, info.config)):
        if fault is not None:
            needed, _, found = fault[0].partition(", got ")
            yield Finding(None, "model", found or "layers of different sizes", needed, fault[1])


def _of_files(info: ModelInfo, target: Target, devices: int) -> Iterator[Finding]:
    """What a quantised checkpoint cannot do."""
    stored = info.quantisation
    if stored is None:
        return
    if target.name == "llama.cpp":
        remedy = "export the directory that it was made from"
        yield Finding(None, "weights", str(stored), "16- or 32-bit weights, which saap export quantises", remedy)
    if target.name == "edge" and stored.method != METHOD:
        remedy = "saap export --quantised int8 of the directory that it was made from"
        yield Finding(None, "weights", str(stored), f"quant_method {METHOD!r} on CPUs", remedy, fault=False)
    if stored.method == METHOD and devices == 1:
        return  # its last group may be shorter
    for index, sizes in enumerate(info.layers):
        for module, row in _rows(sizes).items():
            if row % (stored.group_size * devices):
                needed = f"rows of {IN_PART[module]} in whole groups of {stored.group_size} on each device"
                yield Finding(index, module, f"rows of {row}", needed, "quantise in smaller groups")


def _of_module(
    info: ModelInfo, target: Target, devices: int, kind: str | None, index: int, sizes: LayerUnits, module: str
) -> Iterator[Finding]:
    """What is wrong with the size of one module."""
    kept, rule, again = size_of(sizes, module), target.size_rule(devices), f"prune with --for {target.name}"
    if not splits(sizes, module, kept, devices):
        can = ", ".join(map(str, info.tensor_parallel))
        remedy = f"--tensor-parallel {can}, or {again} --tensor-parallel {devices}"
        yield Finding(index, module, described(sizes, module, kept), shareable(module, devices), remedy)
        return
    wanted = rule.wanted(sizes, module, kept)
    if wanted is None:
        return
    if not kept:
        yield Finding(index, module, f"no {NAMES[module]}", wanted, f"{again}, without --allow-empty")
        return
    wanted, _, row = wanted.partition(", got ")
    found = described(sizes, module, kept) + (f" of {sizes.head_dim}, {row} in a row of o" if row else "")
    needed = wanted + (f" for {kind}" if kind else "")
    yield Finding(index, module, found, needed, _smaller(target, devices, sizes, module))


def _smaller(target: Target, devices: int, sizes: LayerUnits, module: str) -> str:
    """How to come to a size that the target takes; where a type asks for more than ``--for`` does, by another type."""
    own, rule = target_named(target.name), target.size_rule(devices)
    blocks = "another --type: " + ", ".join(kind for kind in own.types if BLOCKS[kind] <= own.row_multiple)
    if module == "attention" and target.row_multiple > own.row_multiple:
        return blocks
    multiple = math.lcm(target.multiple, own.multiple)
    rule = replace(rule, width_multiple=multiple, row_multiple=math.lcm(target.row_multiple, own.row_multiple))
    left = allowed_counts(sizes, module, multiple, rule)
    if not left:
        return f"use target {own.instead}" if target.multiple <= own.multiple else blocks
    options = "" if multiple == own.multiple else f" --multiple {multiple}"
    options += f" --tensor-parallel {devices}" if devices > 1 else ""
    return f"prune with --for {target.name}{options}, which leaves {left[0]} or fewer"


def _rows(sizes: LayerUnits) -> dict[str, int]:
    """Elements in a row of o and of down."""
    return {"attention": sizes.query_heads * sizes.head_dim, "mlp": sizes.intermediate_size}


def _at_a_cost(info: ModelInfo, target: Target, kind: str | None) -> Iterator[Finding]:
    """What runs, but not as well or not for as long."""
    positions, window = info.positions or 0, getattr(info.config, "sliding_window", None)
    sliding = getattr(info.config, "use_sliding_window", True) and window is not None and window < positions
    if target.name == "llama.cpp" and sliding:
        found = f"attention {window:,} tokens back"
        yield Finding(None, "model", found, "attention to all tokens", f"serve at most {window:,} tokens", fault=False)
    if target.name != "edge" or kind is not None or not _by_llama_cpp(info):
        return
    remedy = "llama-quantize takes a larger type for these"
    hidden = info.layers[0].hidden_size
    if hidden % K_BLOCK:
        found = f"rows of {hidden:,} in all projections but o and down"
        yield Finding(None, "model", found, f"a multiple of {K_BLOCK} for K-quants", remedy, fault=False)
    for index, sizes in enumerate(info.layers):
        row = _rows(sizes)["attention"]
        if row % K_BLOCK:
            found, needed = f"rows of {row:,} in o", f"a multiple of {K_BLOCK} for K-quants"
            yield Finding(index, "attention", found, needed, remedy, fault=False)


def _by_llama_cpp(info: ModelInfo) -> bool:
    other = TARGETS["llama.cpp"]
    if info.quantisation is not None or config_fault(other, info.config) is not None:
        return False
    return model_fault(other, info.units, uniform=info.uniform) is None


def _command(info: ModelInfo, target: Target, devices: int, kind: str | None) -> str:
    """One line that runs the model there."""
    folder, name = shlex.quote(info.path), shlex.quote(Path(info.path).resolve().name)
    if target.name in ("vllm", "gpu"):
        split = f" --tensor-parallel-size {devices}" if devices > 1 else ""
        if info.quantisation is not None or kind not in ("int8", "int4"):
            return f"vllm serve {folder}{split}"
        form = "--quantised int8" if kind == "int8" else "--compressed-tensors int4"
        return f"saap export {folder} {form} --out {name}-{kind} && vllm serve {name}-{kind}{split}"
    if target.name == "llama.cpp" or (target.name == "edge" and kind in (None, *GGUF_TYPES) and _by_llama_cpp(info)):
        kind = kind or ("q8_0" if target.name == "llama.cpp" else "q4_k")
        if BLOCKS[kind] < K_BLOCK:
            return f"saap export {folder} {GGUF} {name}.gguf --type {kind} && llama-server -m {name}.gguf"
        made = f"llama-quantize {name}-f16.gguf {name}.gguf {kind.upper()}"
        return f"saap export {folder} {GGUF} {name}-f16.gguf --type f16 && {made} && llama-server -m {name}.gguf"
    if info.quantisation is None and (target.name == "edge" or kind in ("int8", "int4")):
        kind = kind if kind in ("int8", "int4") else "int8"
        return f"saap export {folder} --quantised {kind} --out {name}-{kind} && saap serve {name}-{kind}"
    return f"saap serve {folder}"


def _with_installed(need: str) -> str:
    """A requirement, and what is installed here."""
    try:
        return f"{need} (here: {version(need.split()[0])})"
    except PackageNotFoundError:
        return f"{need} (here: none)"
