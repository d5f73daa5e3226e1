"""The models of the 7B protocol, and what pruning and evaluating one needs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from saap.memory import available_bytes, block_activation_bytes, checkpointed_bytes
from saap.micro_batches import check_one_pass
from saap.opening import open_tokenizer
from saap.search import check_ratio
from saap.statistics import Statistics
from saap.stream import Streaming, streamed_bytes
from saap.units import discover

PROMPT_TOKENS = 1024  # about the longest BoolQ passage; it bounds the logits that zero-shot tasks keep


@dataclass(frozen=True)
class Known:
    """A hub model of the protocol: why this one, and its configuration, so that a dry run needs no hub."""

    path: str
    why: str
    dtype: torch.dtype
    sizes: dict[str, Any]


_LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
KNOWN = {
    "LLaMA-7B": Known(
        "huggyllama/llama-7b",
        "community copy of the first LLaMA in safetensors; the copy that LLM-Pruner's scripts name is gone",
        torch.float16,
        _LLAMA_7B,
    ),
    "Vicuna-7B": Known(
        "lmsys/vicuna-7b-v1.3",
        "the last Vicuna tuned from the first LLaMA, as the published rows are; v1.5 is a Llama-2",
        torch.float16,
        _LLAMA_7B,
    ),
    "Llama-3-8B": Known(
        "meta-llama/Meta-Llama-3-8B",
        "gated: accept its licence on the hub first",
        torch.bfloat16,
        _LLAMA_7B
        | {
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
}


@dataclass(frozen=True)
class Model:
    """One model of the grid: what tables call it, and the directory or hub name that loads."""

    name: str
    path: str

    @property
    def slug(self) -> str:
        """The name of its folder of results."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.path).strip("-.")

    @property
    def local(self) -> bool:
        return Path(self.path).is_dir()


def parse_models(names: list[str]) -> list[Model]:
    """Names of ``KNOWN``, hub names or directories; raises ValueError or FileNotFoundError, having loaded nothing."""
    models = [_parse(name) for name in names]
    for attribute in ("name", "slug"):
        values = [getattr(model, attribute) for model in models]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"--models: expected different models; got {twice} twice")
    return models


def _parse(name: str) -> Model:
    for known, model in KNOWN.items():
        if name in (known, model.path):
            return Model(known, model.path)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"--models: expected a model directory with config.json, found none in {name}")
        return Model(folder.resolve().name, name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return Model(name, name)
    raise ValueError(f"--models: unknown model {name!r}; known: {', '.join(KNOWN)}, OWNER/NAME on the hub, a directory")


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A configuration's model without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_model(model: Model, ratios: tuple[float, ...], method: str, seq_lens: tuple[int, ...]) -> None:
    """Raise ValueError, having loaded its configuration only, for a model that the grid cannot be run on."""
    config = AutoConfig.from_pretrained(model.path)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max(seq_lens) > positions:
        raise ValueError(f"--seq-lens, --seq-len: {max(seq_lens)} exceeds the {positions} positions of {model.name}")
    units = discover(skeleton(config))
    for ratio in ratios:
        check_ratio(units, ratio, method=method)


def check_coupled_memory(model: Model, samples: int, seq_len: int, dtype: str | None) -> None:
    """Raise ValueError where one backward pass of all samples, as coupled statistics take, would find no room.

    By the same estimates as in a cell, without its weights: a long run does not end when it comes to that cell.
    """
    empty = skeleton(AutoConfig.from_pretrained(model.path))
    units, measured = discover(empty), empty.dtype if dtype is None else getattr(torch, dtype)
    device = Streaming().resolved_device(empty)
    weights, free, tokens = units.total_parameters * measured.itemsize, available_bytes(device), samples * seq_len
    if units.total_parameters * empty.dtype.itemsize > 0.9 * free:  # it is streamed by its own dtype's size
        wanted, weights = block_activation_bytes(units, tokens, measured), streamed_bytes(empty, measured)
    else:
        wanted = checkpointed_bytes(units, tokens, measured)
    try:
        check_one_pass(wanted, free - weights, samples, seq_len)
    except ValueError as error:
        raise ValueError(f"--criteria: {model.name}: {error}") from None


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    tokenizer = open_tokenizer(model.path)
    if tokenizer is None:
        raise ValueError(f"--models: expected a model with a tokenizer, found none in {model.path}")
    return tokenizer


def needs(model: Model, ratios: tuple[float, ...], seq_len: int, batch_size: int) -> dict[str, str]:
    """What one model's cells take, from known sizes or a local configuration; asks no hub."""
    known = next((each for each in KNOWN.values() if each.path == model.path), None)
    if known is None and not model.local:
        return {"sizes": "unknown until its configuration is read from the hub"}
    config = AutoConfig.from_pretrained(model.path) if known is None else LlamaConfig(**known.sizes)
    empty = skeleton(config)
    units, dtype = discover(empty), empty.dtype if known is None else known.dtype
    weights = units.total_parameters * dtype.itemsize
    logits = (
        batch_size * PROMPT_TOKENS * config.vocab_size * (dtype.itemsize + 4)
    )  # and their float32 log-probabilities
    calibration = checkpointed_bytes(units, seq_len, dtype)
    modules = Statistics.zeros(units).modules.values()
    statistics = sum(tensor.nbytes for module in modules for tensor in module.tensors().values())
    kept = ", ".join(f"{_gib(weights * (1 - ratio))} at {ratio:.0%}" for ratio in ratios)
    return {
        "parameters": f"{units.total_parameters:,} in {str(dtype).removeprefix('torch.')}",
        "weights": f"{_gib(weights)} on disk" + ("" if model.local else ", from the hub"),
        "checkpoint": f"{kept}, on disk while a cell runs",
        "statistics": f"{_gib(statistics)} on disk per seed",
        "memory": f"calibration at least {_gib(weights + calibration)}, zero-shot tasks up to {_gib(weights + logits)}",
    }


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
