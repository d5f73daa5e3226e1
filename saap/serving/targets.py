"""What each runtime asks of a model's sizes: rules for the search, and for checking what was made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from saap.families import PRUNED_PREFIX
from saap.size_rules import SizeRule
from saap.units import Units

MULTIPLE = 32  # of MLP widths, where neither a person nor a target says
# Weights of one row that a type quantises together: ggml-common.h for GGUF; int8 and int4 of directories in groups.
BLOCKS = (
    dict.fromkeys(("f32", "f16", "bf16"), 1)
    | dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "int8", "int4"), 32)
    | dict.fromkeys(("q6_k", "q5_k", "q4_k", "q3_k", "q2_k"), 256)
)
GGUF_TYPES = tuple(kind for kind in BLOCKS if not kind.startswith("int"))
DIRECTORY_TYPES = ("bf16", "f16", "f32", "int8", "int4")


@dataclass(frozen=True)
class Target:
    """A runtime that a pruned model is made for; query heads, KV heads and widths may all differ by layer there.

    ``multiple`` divides every MLP width (of each expert, on each device) and ``row_multiple`` query heads * head_dim,
    the rows of down and of o that pruning shortens; ``hidden_multiple`` the rows of all other projections, which it
    does not. ``empty``: layers may lack their attention or MLP. ``families`` are those it takes, None for all that
    SAAP knows; of them ``tied`` ones with one size for all layers only, unless their head is the input embedding,
    ``unbiased`` ones without any bias, and all with one of ``activations`` in their MLP and rotary embeddings of one of
    the kinds ``ropes``, over whole heads. ``mixtures`` of experts: "any", "uniform" (equally many of one width in all
    layers) or "none". ``types`` of weights can be asked for.
    ``needs`` are versions, ``instead`` names the targets that take what this one refuses.
    """

    name: str
    title: str
    multiple: int = 1
    row_multiple: int = 1
    hidden_multiple: int = 1
    empty: bool = False
    families: tuple[str, ...] | None = None
    mixtures: str = "any"
    tied: tuple[str, ...] = ()
    unbiased: tuple[str, ...] = ()
    activations: tuple[str, ...] | None = None
    ropes: tuple[str, ...] | None = None
    types: tuple[str, ...] = DIRECTORY_TYPES
    needs: tuple[str, ...] = ()
    instead: str = ""

    def size_rule(self, devices: int = 1) -> SizeRule:
        """What the sizes of every layer must satisfy here, on so many devices."""
        asks = (self.multiple, self.row_multiple, self.empty) != (1, 1, True)
        return SizeRule(devices, self.multiple, self.row_multiple, self.empty, self.name if asks else "")


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        # saap/template builds every layer at its own sizes, empty ones too; per_layer_config is stable from 5.15 on.
        Target("transformers", "transformers, any size", empty=True, needs=("transformers >= 5.15",)),
        # vllm/model_executor/models/transformers/base.py reads per_layer_config from 0.28 on and gives every layer an
        # attention instance, so that none may lack it; moe.py beside it reads one width and one number of experts.
        Target(
            "vllm",
            "vLLM, on its Transformers backend where layers differ",
            mixtures="uniform",
            needs=("vllm >= 0.28", "transformers >= 5.15"),
            instead="transformers",
        ),
        # ggml-common.h: QK4_0, QK8_0 and the like quantise 32 weights of a row together. src/llama-model.cpp sizes
        # layers one by one for "deci" (Llama, Mistral, Qwen2; a layer whose n_ff is 0 loses its attention too) and
        # "openelm" (Qwen3 if tied, without biases), and all alike for "llama", "qwen2" and "qwen3".
        Target(
            "llama.cpp",
            "llama.cpp, GGUF of every type in blocks of 32 weights",
            multiple=32,
            row_multiple=32,
            hidden_multiple=32,
            families=("llama", "mistral", "qwen2", "qwen3"),
            mixtures="none",
            tied=("qwen3",),
            unbiased=("qwen3",),
            activations=("silu", "swish"),
            ropes=("default", "linear", "llama3"),
            types=GGUF_TYPES,
            needs=("gguf >= 0.19",),
            instead="transformers or vllm",
        ),
        # ggml-common.h: QK_K, the block of Q2_K to Q6_K, is 256 weights of a row; llama-quantize takes a larger type
        # where a row has no whole number of them. saap_kernels/packed.py pads quantised rows to 128 and wants groups
        # of 32. Heads are few and large, so o is asked for whole groups only; experts stay in 16 bits.
        Target(
            "edge",
            "CPUs at 8 or 4 bits: rows of down in whole K-quant blocks of 256 for llama.cpp, which are whole lines of "
            "saap_kernels too, rows of o in whole groups of 32",
            multiple=256,
            row_multiple=32,
            hidden_multiple=32,
            mixtures="none",
            types=tuple(BLOCKS),
            needs=("transformers >= 5.15",),
            instead="transformers",
        ),
        # Tiles of cuBLAS and CUTLASS are 128 wide (NVIDIA, Matrix Multiplication Background: tile quantisation), and
        # 16-bit rows run best in whole 128 bytes, 64 elements (the same, on A100); Marlin's int4 groups are 128 wide.
        Target(
            "gpu",
            "CUDA GPUs under vLLM or transformers: widths of whole 128-wide tiles on each device, rows of o in whole "
            "lines of 64 16-bit values",
            multiple=128,
            row_multiple=64,
            mixtures="uniform",
            needs=("vllm >= 0.28", "transformers >= 5.15"),
            instead="transformers",
        ),
    )
}


def target_named(name: Any) -> Target:
    """The target of this name; ValueError naming the known ones."""
    if not isinstance(name, str) or name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {name!r}")
    return TARGETS[name]


def for_type(target: Target, kind: str) -> Target:
    """The target with what weights of one type ask for; ValueError for types that it does not have.

    Where all that the target asks for is whole blocks, other blocks take the place of its own.
    """
    if kind not in target.types:
        raise ValueError(f"type must be one of {', '.join(target.types)} for target={target.name!r}; got {kind!r}")
    block = BLOCKS[kind]
    if target.hidden_multiple > 1:
        return replace(target, multiple=block, row_multiple=block, hidden_multiple=block)
    both = math.lcm(target.multiple, block), math.lcm(target.row_multiple, block)
    return replace(target, multiple=both[0], row_multiple=both[1], hidden_multiple=block)


def size_rule(target: str | None, devices: Any = 1) -> SizeRule:
    """What sizes must satisfy for a target, or for none, on so many devices; ValueError for either that is unknown."""
    if target is None:
        return SizeRule(devices)
    return target_named(target).size_rule(devices)


def constraints(
    target: str | None, units: Units, *, multiple: int | None, tensor_parallel: int, allow_empty: bool, uniform: bool
) -> tuple[int, SizeRule]:
    """The multiple of MLP widths and the rule that a search keeps, of its options and the target.

    ``multiple`` None is the least that serves the target, at least ``MULTIPLE``. Raises ValueError for options that
    contradict the target, naming both, and for models that it cannot take at all.
    """
    rule = size_rule(target, tensor_parallel)
    row = TARGETS["transformers"] if target is None else target_named(target)
    if multiple is not None and multiple % row.multiple:
        raise ValueError(
            f"multiple={multiple} contradicts target={target!r}, where MLP widths are multiples of {row.multiple}: "
            "expected a multiple of it, or none"
        )
    if allow_empty and not row.empty:
        raise ValueError(
            f"allow_empty=True contradicts target={target!r}, which takes no layer without attention or MLP"
        )
    if target is not None:
        check_model(target, units, uniform=uniform)
    return (math.lcm(MULTIPLE, row.multiple) if multiple is None else multiple), rule


def check_model(target: str, units: Units, *, uniform: bool, alike: bool = False) -> None:
    """Raise ValueError, saying what to do instead, for a model that ``target`` cannot take at these or other sizes.

    ``uniform`` says that all its layers have one size, or will have, ``alike`` that at least their experts have.
    """
    fault = model_fault(target_named(target), units, uniform=uniform, alike=alike)
    if fault is not None:
        raise ValueError(f"target={target!r} takes {fault[0]}: {fault[1]}")


def model_fault(target: Target, units: Units, *, uniform: bool, alike: bool = False) -> tuple[str, str] | None:
    """(what the target takes and what came, what to do instead), None where it takes the model; see ``check_model``."""
    family, first = units.family, units.layers[0]
    instead = f"use target {target.instead}"
    mixture = any(layer.experts for layer in units.layers)
    if target.families is not None and family not in target.families:
        return f"{', '.join(target.families)}, got {family}", instead
    if mixture and target.mixtures == "none":
        return f"no mixture of experts, got {family}", instead
    if first.hidden_size % target.hidden_multiple:
        needed = f"hidden sizes that are multiples of {target.hidden_multiple}, got hidden size {first.hidden_size}"
        return needed, "use a type with smaller blocks, or target transformers or vllm"
    biases = sorted({part for layer in units.layers for part in layer.biases})
    if family in target.unbiased and biases:
        return f"a {family} without biases, got them in {', '.join(biases)}", instead
    if uniform:
        return None
    if mixture and target.mixtures == "uniform" and not alike:
        needed = f"a {family} with equally many experts of one width in all layers only"
        return needed, f"give uniform=True (--uniform), or {instead}"
    if family in target.tied and not is_tied(units):
        needed = f"a {family} whose head is not its input embedding with one size for all layers only"
        return needed, f"give uniform=True (--uniform), or {instead}"
    return None


def check_config(target: str | None, config: Any, compensate: str = "none") -> None:
    """Raise ValueError for what ``target`` does not take of a model's configuration, or of the biases it is to get."""
    if target is None:
        return
    row, fault = target_named(target), config_fault(target_named(target), config)
    if fault is not None:
        raise ValueError(f"target={target!r} takes {fault[0]}: {fault[1]}")
    family = str(config.model_type).removeprefix(PRUNED_PREFIX)
    if compensate == "bias" and family in row.unbiased:
        raise ValueError(f"compensate='bias' contradicts target={target!r}, which takes a {family} without biases")


def config_fault(target: Target, config: Any) -> tuple[str, str] | None:
    """As ``model_fault``, of what a configuration says beside sizes."""
    activation = getattr(config, "hidden_act", None)
    if target.activations is not None and activation not in target.activations:
        return f"MLPs with {' or '.join(target.activations)}, got {activation}", f"use target {target.instead}"
    return None if target.ropes is None else _rope_fault(target, target.ropes, config)


def _rope_fault(target: Target, ropes: tuple[str, ...], config: Any) -> tuple[str, str] | None:
    values = getattr(config, "rope_parameters", None) or {}
    kind, part = values.get("rope_type", "default"), values.get("partial_rotary_factor", 1.0)
    family = str(config.model_type).removeprefix(PRUNED_PREFIX)
    if kind not in ropes or (kind == "llama3" and family == "qwen3"):
        wanted = f"rotary embeddings of {' or '.join(ropes)} (llama3 not for qwen3)"
        return f"{wanted}, got {kind}", f"use target {target.instead}"
    if part != 1.0:
        return f"rotary embeddings of whole heads, got partial_rotary_factor {part}", f"use target {target.instead}"
    return None


def is_tied(units: Units) -> bool:
    """Whether the output head is the input embedding: outside of the layers there is no room for both.

    Not for models with learned positions (OPT), which are outside of the layers too.
    """
    return 0 < units.total_parameters - units.block_parameters < 2 * units.head_parameters
