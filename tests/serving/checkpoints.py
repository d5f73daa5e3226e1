"""Small checkpoints for servers, plain and quantised, whose layers differ in size, and their greedy tokens."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import saap
from saap.families import family_of, layers_of
from saap.plan import LayerPlan, Plan
from saap.stored_weight import METHOD, to_stored
from saap.units import discover
from saap_kernels import pack, unpack
from tests.saap.tiny import tiny_model, tiny_tokenizer

# of three layers: KV heads kept of 4, and channels of 97
SIZES = (((0, 2, 3), range(0, 90, 2)), ((1,), range(5, 38)), ((0, 1, 2, 3), range(97)))
# of three layers with 128 channels: what two devices can share, KV heads copied in the second
EVEN = (((0, 2), range(0, 64)), ((1,), range(128)), ((0, 1, 2, 3), range(32, 96)))


def tiny_checkpoint(folder: Path, family: str, sizes=SIZES, **overrides) -> Path:
    """A random model of three layers with these sizes, and a tokenizer."""
    model = tiny_model(family, torch.float32, **overrides)
    units = discover(model)
    group = units.layers[0].kv_heads // 4
    layers = [
        LayerPlan(tuple(head * group + i for head in heads for i in range(group)), tuple(channels))
        for heads, channels in sizes
    ]
    saap.save(saap.compact(model, Plan(units, tuple(layers), {"made": "by hand"})), folder, tokenizer=tiny_tokenizer())
    return folder


def mixture_checkpoint(folder: Path, family: str, widths=(16, 16, 16)) -> Path:
    """A random mixture of three layers with 3 of 4 experts of these widths, heads of 32 and other KV heads by layer."""
    model = tiny_model(family, torch.float32, head_dim=32)
    units = discover(model)
    full = units.layers[0].intermediate_size
    layers = [
        LayerPlan(heads, tuple(expert * full + channel for expert in range(3) for channel in range(width)), (0, 1, 2))
        for heads, width in zip(((0, 1), (0,), (1, 2, 3)), widths, strict=True)
    ]
    saap.save(saap.compact(model, Plan(units, tuple(layers), {"made": "by hand"})), folder, tokenizer=tiny_tokenizer())
    return folder


def quantised_checkpoint(source: Path, folder: Path, bits: int, group_size: int) -> tuple[Path, Path]:
    """``source`` with its decoder layers' Linears stored by quant_method "saap", and these values as plain weights."""
    model = saap.load(source)
    family, plain = family_of(model), folder.with_name(f"{folder.name}-plain")
    stored, dequantised = load_file(source / "model.safetensors"), load_file(source / "model.safetensors")
    for index in range(len(layers_of(model, family))):
        for path in dict.fromkeys(family.path(part) for part in family.linear_parts):
            name = f"{family.layers}.{index}.{path}"
            packed = pack(stored.pop(f"{name}.weight"), bits=bits, group_size=group_size)
            stored |= {f"{name}.{kind}": tensor for kind, tensor in to_stored(packed).items()}
            dequantised[f"{name}.weight"] = unpack(packed).contiguous()
    for target, tensors in ((folder, stored), (plain, dequantised)):
        shutil.copytree(source, target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    change_config(
        folder,
        quantization_config={
            "quant_method": METHOD,
            "version": 1,
            "bits": bits,
            "group_size": group_size,
            "modules_to_not_convert": ["lm_head"],
        },
    )
    return folder, plain


def change_config(folder: Path, **values) -> Path:
    """Set values in a checkpoint's configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2))
    return folder


def greedy(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The ``count`` tokens by which transformers continues each prompt in fp32, each by itself."""
    model = saap.load(folder, torch.float32)
    options = {"max_new_tokens": count, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return [
            # the mask: without it token 0 would be taken for padding
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
            for ids in (torch.tensor([prompt]) for prompt in prompts)
        ]
