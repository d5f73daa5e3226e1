"""The files of a model directory before anything is loaded: what is missing, damaged, pickled or points elsewhere."""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from saap.families import PRUNED_PREFIX, family_named, known_families
from saap.layout import sizes_by_layer
from saap.plan import Plan

PLAN_FILE = "saap_plan.json"
WEIGHT_INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def plan_in(folder: Path) -> Plan | None:
    """The plan that a model directory has of its pruning, or None."""
    file = folder / PLAN_FILE
    return Plan.load(file) if file.is_file() else None


def check_directory(folder: Path) -> PreTrainedConfig:
    """The configuration of a model directory whose files are whole, belong together and lie within it.

    Raises FileNotFoundError for what is missing and ValueError, naming the file, for a configuration that is none,
    damaged or pickled weights, a plan that does not describe the configuration, and paths out of the directory.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a local model directory, found none at {folder}")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"expected a model directory with config.json, found none in {folder}")
    values = read_object(file)
    _check_code(values, folder)
    if values.get("transformers_weights") is not None:
        raise ValueError(f"{file}: transformers_weights names other weight files, which are not read; remove it")
    for weights in weight_files(folder):
        check_safetensors(weights)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is not a configuration that transformers can read: {error}") from error
    plan = plan_in(folder)
    if plan is not None:
        check_plan(plan, config, folder / PLAN_FILE)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint: those that its index names, or all there are."""
    index, single = folder / WEIGHT_INDEX, folder / "model.safetensors"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise _without_weights(folder)
        return files
    named = read_object(index, "an index of safetensors files").get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} is not an index of safetensors files: expected a weight_map with names of files")
    names = sorted(set(named.values()))
    for name in names:
        if not within(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: expected names of safetensors files in {folder}, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not in {folder}")
    return [single] if single.is_file() else [folder / name for name in names]  # where both are there, as transformers


def within(name: str) -> bool:
    """Whether a path in a checkpoint stays in its directory, on every system."""
    return all(
        not path.is_absolute() and not path.drive and not path.root and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def check_safetensors(file: Path) -> None:
    """Raise ValueError naming a safetensors file that is damaged or cut short."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def check_plan(plan: Plan, config: PreTrainedConfig, file: str | os.PathLike[str]) -> None:
    """Raise ValueError naming the first layer in which ``plan`` leaves other sizes than ``config`` states."""
    kind = str(config.model_type).removeprefix(PRUNED_PREFIX)
    if kind not in known_families():
        raise ValueError(f"{file} is a plan for {plan.units.family}, but the model is a {kind}")
    found = sizes_by_layer(config, family_named(kind))
    if len(found) != len(plan.layers):
        raise ValueError(f"{file} is a plan for {len(plan.layers)} layers, but the model has {len(found)}")
    for index, (layer, old, sizes) in enumerate(zip(plan.layers, plan.units.layers, found, strict=True)):
        left = {"kv_heads": len(layer.kv_heads), "query_heads": len(layer.kv_heads) * old.group,
                "intermediate_size": layer.width, "experts": len(layer.experts)}  # fmt: skip
        for name, value in sizes.items():
            if left[name] != value:
                raise ValueError(
                    f"{file} is not of this model: {name} of layer {index} is {left[name]} there, {value} in the model"
                )


def read_object(file: Path, what: str = "a JSON object") -> dict[str, Any]:
    """A JSON object; ValueError naming the file for anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not {what}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not {what}: it holds a {type(values).__name__}")
    return values


def _check_code(values: dict[str, Any], folder: Path) -> None:
    """Refuse a pruned checkpoint that names code outside of its directory; saap itself runs none of a checkpoint."""
    if not str(values.get("model_type")).startswith(PRUNED_PREFIX):
        return
    for key, name in dict(values.get("auto_map") or {}).items():
        module, dot, _ = str(name).rpartition(".")
        if not dot or not module.isidentifier():
            raise ValueError(f"{folder / 'config.json'}: auto_map {key} names code outside of the directory: {name!r}")


def _without_weights(folder: Path) -> Exception:
    pickled = sorted(file.name for kind in PICKLED for file in folder.glob(kind))
    if pickled:
        return ValueError(
            f"expected .safetensors weights in {folder}, found {pickled[0]}: pickled files are not opened, because "
            "they can run code; where you trust it, load it with transformers and call save_pretrained, which writes "
            "safetensors"
        )
    return FileNotFoundError(f"expected .safetensors weights in {folder}, found none")
