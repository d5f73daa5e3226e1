"""Write a model as one GGUF file that llama.cpp runs."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from saap.checkpoint_files import weight_files
from saap.families import PRUNED_PREFIX
from saap.model_info import skeleton
from saap.opening import has_tokenizer
from saap.serving.gguf_architecture import Architecture, refuse_family, refuse_misaligned
from saap.serving.gguf_metadata import ROPE_FACTORS, context_of, form_of, write_metadata
from saap.serving.gguf_tensors import QUANTISED, TYPES, Entry, Weights, entries, opened, stored_bytes, values_of
from saap.serving.gguf_tokenizer import Vocabulary, vocabulary_of
from saap.units import LayerUnits, discover

__all__ = ["TYPES", "export_gguf"]

Progress = Callable[[int, int], None]
HEADER_BYTES = 4096  # an estimate of all but tensors and tokenizer, for the space that is asked for


@dataclass(frozen=True)
class _Model:
    """A model directory that has passed every check."""

    name: str
    config: PreTrainedConfig
    layers: tuple[LayerUnits, ...]
    architecture: Architecture
    tied: bool
    factors: NDArray[np.float32] | None
    context: int
    vocabulary: Vocabulary | None
    files: Sequence[Path]
    shapes: dict[str, tuple[int, ...]]


def export_gguf(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str,
    *,
    force: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Write the model directory ``path`` as the GGUF file ``out``, weights of ``type``; returns ``out``.

    Norms and biases are f32. The output head, or the embeddings where they are it, are q8_0 in all quantised types.
    Weights are read, turned and written one tensor at a time; the file appears at once, complete, and ``force``
    replaces an existing one only then. ``progress`` is called with (tensors written, tensors); ``tell`` gets
    what a user should know about the file, which is a warning otherwise.

    Before any work raises ValueError for families and sizes that llama.cpp has no architecture for, naming the layer,
    for quantised or damaged models and unknown types, FileNotFoundError for what is no model directory,
    FileExistsError for an existing ``out``, and RuntimeError without the package gguf.
    """
    source, target, kind = Path(path), Path(out), _checked_type(type)
    _refuse_target(target, force)
    _require_gguf()
    model = _checked(source, kind, tell or (lambda text: warnings.warn(text, stacklevel=3)))
    with opened(model.files, model.shapes) as weights:
        if model.tied:
            _refuse_another_head(weights, Path(path))
        tensors = entries(weights, model.architecture, model.layers, model.tied, kind)
        _refuse_without_space(target, tensors)
        with _written_whole(target) as file:
            _write(file, model, kind, tensors, weights, progress)
    return target


def _refuse_another_head(weights: Weights, folder: Path) -> None:
    """Raise ValueError for a head beside the embeddings that it is said to share: transformers keeps both."""
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    both = {head, embeddings} <= set(weights.names)
    if both and not np.array_equal(weights.read(head), weights.read(embeddings)):
        raise ValueError(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embeddings; expected it to be "
            "false in config.json"
        )


def _checked_type(kind: str) -> str:
    lower = kind.lower()
    if lower not in TYPES:
        hint = ""
        if "_k" in lower or lower.startswith("iq"):
            hint = "; for this one run llama.cpp's llama-quantize on an f16 file: the gguf package cannot make it"
        raise ValueError(f"expected a type of {', '.join(TYPES)}; got {kind!r}{hint}")
    return lower


def _refuse_target(target: Path, force: bool) -> None:
    if target.is_dir():
        raise FileExistsError(f"{target} is a directory; expected a file to write")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already; use force (--force) to replace it")


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise RuntimeError("GGUF files need the package gguf: pip install 'saap[gguf]'") from error


def _checked(folder: Path, kind: str, tell: Callable[[str], None]) -> _Model:
    _refuse_by_config(folder)
    model = skeleton(folder)
    config, layers = model.config, discover(model).layers
    architecture, factors = form_of(config, layers)
    if kind in QUANTISED:
        refuse_misaligned(layers, kind)
    vocabulary = None
    if has_tokenizer(folder):
        vocabulary = vocabulary_of(folder, config)
        for note in vocabulary.notes:
            tell(note)
    else:
        tell(f"{folder} has no tokenizer: the file has none either, and runs on token ids only")
    return _Model(
        name=folder.resolve().name,
        config=config,
        layers=layers,
        architecture=architecture,
        tied=bool(config.tie_word_embeddings),
        factors=factors,
        context=context_of(config, tell),
        vocabulary=vocabulary,
        files=weight_files(folder),
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    )


def _refuse_by_config(folder: Path) -> None:
    """What config.json alone says against it, in words that fit an export."""
    file = folder / "config.json"
    if not file.is_file():
        return  # told by skeleton
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        family = str(raw.get("model_type", "unknown")).removeprefix(PRUNED_PREFIX)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a configuration: {error}") from error
    refuse_family(family)
    if raw.get("quantization_config"):
        raise ValueError(
            f"{folder} holds quantised weights ({raw['quantization_config'].get('quant_method', 'unknown method')}); "
            "export the model that it was made from: --type q8_0 or q4_0 quantises"
        )


def _refuse_without_space(target: Path, tensors: Sequence[Entry]) -> None:
    needed = HEADER_BYTES + sum(stored_bytes(entry)[1] for entry in tensors)
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{target} takes {needed / 2**20:,.0f} MiB, {folder} has {free / 2**20:,.0f} MiB left")


def _write(
    file: Path, model: _Model, kind: str, tensors: Sequence[Entry], weights: Weights, progress: Progress | None
) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, model.architecture.name)
    try:
        write_metadata(
            writer, model.config, model.architecture, model.layers, kind=kind, name=model.name, context=model.context
        )
        if model.vocabulary is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            model.vocabulary.write(writer)
        _write_tensors(writer, model.factors, tensors, weights, progress or (lambda done, total: None))
    finally:
        writer.close()


def _write_tensors(
    writer: Any, factors: NDArray[np.float32] | None, tensors: Sequence[Entry], weights: Weights, progress: Progress
) -> None:
    import gguf

    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for entry in tensors:
        shape, size = stored_bytes(entry)
        dtype = {"f32": np.float32, "f16": np.float16}.get(entry.kind, np.uint8)
        kind = gguf.GGMLQuantizationType[entry.kind.upper()]
        writer.add_tensor_info(entry.name, shape, np.dtype(dtype), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    progress(0, len(tensors))
    for done, entry in enumerate(tensors, 1):
        writer.write_tensor_data(values_of(entry, weights))
        progress(done, len(tensors))


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A sibling file that replaces ``target`` when the context ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.incomplete-"
    for stale in target.parent.glob(f"{prefix}*"):  # what a killed process left behind
        stale.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=prefix)
    os.close(handle)
    file = Path(name)
    try:
        yield file
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.chmod(0o644)
        file.replace(target)
    finally:
        file.unlink(missing_ok=True)
