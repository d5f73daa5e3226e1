"""A model as a command needs it: on its device, or left in mapped files to be streamed."""

import os
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from saap.checkpoint import load
from saap.memory import on_device
from saap.stream import Streaming, resolve_streaming

DTYPES = ("float32", "bfloat16", "float16")


def open_model(path: str, dtype: str | None = None) -> PreTrainedModel:
    """Load a model and move it to the GPU if it fits there."""
    _check_dtype(dtype)
    return on_device(load(path, dtype))


def open_for_calibration(
    path: str, dtype: str | None, stream: bool | str, folder: str | os.PathLike[str] | None
) -> tuple[PreTrainedModel, Streaming | None]:
    """As ``open_model``, or with its weights left in their mapped files, and how they are to be streamed.

    A streamed model keeps its saved dtype; ``dtype`` is what its blocks are brought in as.
    """
    _check_dtype(dtype)
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"expected an existing folder for hidden states, found none at {folder}")
    mapped = load(path)
    streaming = resolve_streaming(mapped, stream)
    if streaming is not None:
        return mapped, Streaming(dtype=None if dtype is None else getattr(torch, dtype), folder=folder)
    return on_device(mapped if dtype is None else load(path, dtype)), None


def open_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None when its directory has none."""
    folder = Path(path)
    if folder.is_dir() and not has_tokenizer(folder):
        return None
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def has_tokenizer(folder: Path) -> bool:
    return bool(list(folder.glob("*token*")))


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
