"""Adapters of a quantised model on disk: in PEFT's layout where it can express them.

A directory has ``saap_adapters.json``, which says what base the adapters belong to, and one of these:

- Zero points alone are LoRA whose A has one column per group, repeated over the inputs of that group: peft's own files,
  ``adapter_config.json`` and ``adapter_model.safetensors`` with A written out so, learned norms as "modules_to_save".
  ``peft.PeftModel.from_pretrained`` runs them beside the quantised base; as it adds their product in place of moving
  zero points, which are rounded to their dtype, its results differ by that rounding.
- Levels that moved have been rounded, which no layout of peft's has a word for: ``saap_adapters.safetensors`` has the
  four factors of NAME as ``NAME.a``, ``NAME.b``, ``NAME.u`` and ``NAME.v`` (``saap.recovery.group_adapter``), and
  learned norms as ``NAME.weight``. There is no ``adapter_config.json``, so that peft refuses the directory.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from saap.checkpoint import refuse_existing, written_whole
from saap.quantised_linear import QuantisedLinear
from saap.recovery.adapted_linear import AdaptedLinear, adapted_linears, group_count
from saap.recovery.adapter_base import BaseOfAdapters
from saap.recovery.attach import Groupwise, quantised_linears
from saap.recovery.group_adapter import Factors
from saap.recovery.learned_norms import learned_weights
from saap.recovery.training_folder import read_tensors
from saap.refuse import refuse_meta, refuse_unsupported
from saap.version import __version__

FORMAT = 1
ABOUT = "saap_adapters.json"
OWN, PEFT_CONFIG, PEFT = "saap_adapters.safetensors", "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def save_adapters(model: PreTrainedModel, folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the adapters of ``model``, merged or not, and its learned norms as the directory ``folder``.

    The directory appears at once, complete; ``force`` replaces one. Raises ValueError for a model without group-wise
    adapters and FileExistsError for a directory that exists.
    """
    linears = dict(adapted_linears(model))
    if not linears:
        raise ValueError("model: expected group-wise adapters, as saap.recovery.attach gives them, found none")
    refuse_existing(Path(folder), force)
    levels = next(iter(linears.values())).lora_level_u is not None
    norms = {name: each.detach() for name, each in learned_weights(model) if each.requires_grad}
    about = {
        "format": FORMAT,
        "written_by": f"saap {__version__}",
        "layout": "saap" if levels else "peft",
        "scaling": next(iter(linears.values())).scaling,
        "norms": sorted(norms),
        "base": BaseOfAdapters.of(model).to_dict(),
    }
    tensors = _own_tensors(linears, norms) if levels else _peft_tensors(linears, norms, model)
    with written_whole(Path(folder)) as made:
        save_file(_on_host(tensors), made / (OWN if levels else PEFT), metadata={"format": "pt"})
        (made / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if not levels:
            config = json.dumps(_peft_config(model, linears, sorted(norms)), indent=2)
            (made / PEFT_CONFIG).write_text(config + "\n", encoding="utf-8")


def load_adapters(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Groupwise:
    """Attach the adapters in ``folder`` to the quantised ``model`` that they were made for, in place.

    What is returned can be trained on, merged (``merge_adapters``) or finished. Raises FileNotFoundError where files
    are missing and ValueError, with nothing changed, for adapters of another plan, base or group size and for damaged
    files.
    """
    folder = Path(folder)
    about = _about(folder)
    refuse_unsupported(model, quantised=True)
    refuse_meta(model)
    linears = quantised_linears(model)
    if not linears:
        raise ValueError("model: expected the quantised model that the adapters were made for, got plain weights")
    BaseOfAdapters.from_dict(about["base"], folder / ABOUT).check(model, folder)
    file = folder / (OWN if about["layout"] == "saap" else PEFT)
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}, which {ABOUT} speaks of")
    tensors = read_tensors(file)
    read = _factors_of_own if about["layout"] == "saap" else _factors_of_peft
    found = {name: read(file, tensors, name, module) for name, module in linears.items()}
    norms = _norms(file, tensors, about, model)
    attached = Groupwise(
        model, {name: _placed(found[name], linears[name], about["scaling"]) for name in linears}, bool(norms)
    )
    with torch.no_grad():
        for name, parameter in learned_weights(model) if norms else ():
            parameter.copy_(norms[name])
    return attached


def _about(folder: Path) -> dict[str, Any]:
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(f"no {ABOUT} in {folder}; expected a directory that save_adapters wrote")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{folder / ABOUT} is no JSON: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise ValueError(f"{folder / ABOUT}: expected format {FORMAT}, got {found!r:.40}")
    wanted = {"layout": str, "scaling": float, "norms": list, "base": dict}
    wrong = [name for name, kind in wanted.items() if not isinstance(about.get(name), kind)]
    if wrong or about["layout"] not in ("peft", "saap"):
        raise ValueError(f"{folder / ABOUT}: expected a valid {(wrong or ['layout'])[0]}, the file is damaged")
    return about


def _own_tensors(linears: dict[str, AdaptedLinear], norms: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {f"{name}.weight": tensor for name, tensor in norms.items()}
    for name, module in linears.items():
        found |= {f"{name}.{each}": getattr(module.factors, each).detach() for each in "abuv"}
    return found


def _peft_tensors(
    linears: dict[str, AdaptedLinear], norms: dict[str, Tensor], model: PreTrainedModel
) -> dict[str, Tensor]:
    found = {}
    for name, tensor in norms.items():  # peft wants modules whole: a bias, which did not learn, too
        bias = getattr(model.get_submodule(name), "bias", None)
        found[f"{PEFT_PREFIX}{name}.weight"] = tensor
        found |= {} if bias is None else {f"{PEFT_PREFIX}{name}.bias": bias.detach()}
    for name, module in linears.items():
        group_size, factors = module.layout[2], module.factors
        assert group_size is not None
        expanded = factors.a.detach().repeat_interleave(group_size, 1)[:, : module.in_features]
        found[f"{PEFT_PREFIX}{name}.lora_A.weight"] = expanded
        found[f"{PEFT_PREFIX}{name}.lora_B.weight"] = factors.b.detach()
    return found


def _peft_config(model: PreTrainedModel, linears: dict[str, AdaptedLinear], norms: list[str]) -> dict[str, Any]:
    ranks = {name: len(module.factors.a) for name, module in linears.items()}
    scaling, rank = next(iter(linears.values())).scaling, max(ranks.values())
    others = {name: each for name, each in ranks.items() if each != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path or None,
        "r": rank,
        "lora_alpha": scaling * rank,
        "rank_pattern": others,
        "alpha_pattern": {name: scaling * each for name, each in others.items()},
        "target_modules": list(linears),
        "modules_to_save": norms or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _factors_of_own(file: Path, tensors: dict[str, Tensor], name: str, module: QuantisedLinear) -> dict[str, Tensor]:
    columns, rows, groups = module.in_features, module.out_features, group_count(module)
    found = {each: _tensor(file, tensors, f"{name}.{each}") for each in "abuv"}
    for each, side, size in (("a", 1, groups), ("b", 0, rows), ("u", 1, columns), ("v", 0, rows)):
        _check_size(file, f"{name}.{each}", found[each], side, size)
    for down, up in ("ab", "uv"):
        _check_ranks(file, name, found[down], found[up])
    return found


def _factors_of_peft(file: Path, tensors: dict[str, Tensor], name: str, module: QuantisedLinear) -> dict[str, Tensor]:
    keys = [f"{PEFT_PREFIX}{name}.lora_{each}.weight" for each in "AB"]
    expanded, up = (_tensor(file, tensors, key) for key in keys)
    _check_size(file, keys[0], expanded, 1, module.in_features)
    _check_size(file, keys[1], up, 0, module.out_features)
    _check_ranks(file, name, expanded, up)
    group_size = module.layout[2]
    assert group_size is not None
    a = expanded[:, ::group_size].contiguous()
    if not torch.equal(a.repeat_interleave(group_size, 1)[:, : module.in_features], expanded):
        raise ValueError(
            f"{file}: {keys[0]} is not the same over each group of {group_size} inputs: zero points cannot express it; "
            "merge it into plain weights with peft"
        )
    return {"a": a, "b": up}


def _placed(found: dict[str, Tensor], module: QuantisedLinear, scaling: float) -> Factors:
    """On the device of the Linear."""
    on_device = {name: tensor.to(module.qweight.device) for name, tensor in found.items()}
    return Factors(on_device["a"], on_device["b"], on_device.get("u"), on_device.get("v"), scaling)


def _tensor(file: Path, tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{file} has no {key}, the file is damaged")
    if not bool(tensors[key].isfinite().all()):
        raise ValueError(f"{file}: {key}: expected finite values, found NaN or inf")
    return tensors[key].float()


def _check_size(file: Path, key: str, tensor: Tensor, side: int, size: int) -> None:
    if tensor.ndim != 2 or tensor.shape[side] != size:
        wanted = f"(rank, {size})" if side else f"({size}, rank)"
        raise ValueError(f"{file}: {key}: expected shape {wanted}, got {tuple(tensor.shape)}")


def _check_ranks(file: Path, name: str, down: Tensor, up: Tensor) -> None:
    if len(down) != up.shape[1]:
        raise ValueError(f"{file}: {name}: expected factors of one rank, got {len(down)} and {up.shape[1]}")


def _norms(file: Path, tensors: dict[str, Tensor], about: dict[str, Any], model: PreTrainedModel) -> dict[str, Tensor]:
    """{name: weight}, all of the model's or none."""
    if not about["norms"]:
        return {}
    mine, prefix = dict(learned_weights(model)), PEFT_PREFIX if about["layout"] == "peft" else ""
    if sorted(mine) != about["norms"]:
        differing = ", ".join(sorted(set(mine) ^ set(about["norms"]))[:3])
        raise ValueError(f"{file}: expected weights of the model's norms, got others: {differing}")
    found = {name: _tensor(file, tensors, f"{prefix}{name}.weight") for name in mine}
    for name, tensor in found.items():
        if tensor.shape != mine[name].shape:
            wanted, got = tuple(mine[name].shape), tuple(tensor.shape)
            raise ValueError(f"{file}: {name}.weight: expected shape {wanted}, got {got}")
    return found


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
