"""The directory of a training run: what it was started with, and whole checkpoints of what learns alone."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saap.plan import write_atomically

LEARNED = "learned.safetensors"
STATE = "trainer_state.json"  # transformers' name for it
SETTINGS = "settings.json"
UNFINISHED = ".unfinished"  # where a checkpoint is written before it is moved to its name
PREFIX = "checkpoint-"  # transformers' name for them, before the step

Record = dict[str, Any]


def learned(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of the parameters that require grad."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_learned(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write ``learned``'s tensors into ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / LEARNED)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Those of a safetensors file, on the CPU; ValueError naming one that is damaged."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: the file is damaged: {error}") from error


def read_learned(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """A checkpoint's parameters, on the CPU; ValueError where names or shapes are not those that learn in ``model``."""
    saved, mine = read_tensors(folder / LEARNED), learned(model)
    sizes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (mine, saved)]
    if sizes[0] != sizes[1]:
        differing = sorted(dict(sizes[0].items() ^ sizes[1].items()))
        raise ValueError(f"{folder}: expected the parameters that learn here, got others: {', '.join(differing[:3])}")
    return saved


def restore_learned(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's parameters into those of ``model``; ValueError where names or shapes differ."""
    saved = read_learned(model, folder)
    with torch.no_grad():
        for name, tensor in learned(model).items():
            tensor.copy_(saved[name])


def read_log(checkpoint: Path) -> list[dict[str, float]]:
    """What the training had logged up to a checkpoint; ValueError or FileNotFoundError naming the file."""
    file = checkpoint / STATE
    try:
        log = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        if not (isinstance(log, list) and all(isinstance(entry, dict) for entry in log)):
            raise TypeError("expected a list of objects as log_history")
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    return log


def refuse_none_to_finish(folder: Path, finish: bool) -> None:
    """Raise FileNotFoundError where there is no checkpoint to ``finish`` from."""
    if finish and last_checkpoint(folder) is None:
        raise FileNotFoundError(f"no checkpoint to finish from in {folder}: go on with resume (--resume)")


def open_folder(folder: Path, record: Record, resume: bool, finish: bool = False) -> Path | None:
    """Make ``folder`` that of a run described by ``record``; the checkpoint to go on from when one is resumed.

    None starts from the beginning. Raises FileExistsError for a directory with something in it unless ``resume`` or
    ``finish``, then FileNotFoundError for one without a run, or without a checkpoint to finish from, and ValueError
    listing each difference to the run that is in it.
    """
    if not (resume or finish):
        if folder.exists() and (folder.is_file() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists already: resume the training in it, or remove it to start anew")
        write_atomically(folder / SETTINGS, json.dumps(record, indent=2) + "\n")
        return None
    refuse_differences(folder, record)
    refuse_none_to_finish(folder, finish)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return last_checkpoint(folder)


def refuse_differences(folder: Path, record: Record) -> None:
    """As ``open_folder`` when a run is resumed; a ``record`` of some things is compared by those alone."""
    old = _read_record(folder)
    changed = differences({name: old.get(name, "nothing") for name in record}, json.loads(json.dumps(record)))
    if changed:
        raise ValueError(f"cannot resume the training in {folder}, which was another one: {'; '.join(changed)}")


def _read_record(folder: Path) -> Record:
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"no training to resume in {folder}: expected {SETTINGS} in it")
    try:
        record = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{folder / SETTINGS}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{folder / SETTINGS}: expected an object that describes a training, got {record!r:.40}")
    return record


def differences(old: Record, new: Record, within: str = "") -> list[str]:
    """ "name: old -> new" for every value of nested dictionaries that differs."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, "nothing"), new.get(name, "nothing")
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{within}{name}.")
        elif before != after:
            found.append(f"{within}{name}: {before} -> {after}")
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a training directory."""
    return max(checkpoints(folder), key=step_of, default=None)


def checkpoints(folder: Path) -> list[Path]:
    """All of them, whole: a checkpoint gets its name when everything of it is on the disk."""
    return [each for each in folder.glob(f"{PREFIX}*") if each.name.removeprefix(PREFIX).isdigit()]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def finish_checkpoint(folder: Path, step: int, best: int) -> None:
    """Move the checkpoint of ``step`` to its name, then remove those that are neither it nor the ``best``."""
    written = folder / UNFINISHED / f"{PREFIX}{step}"
    for file in written.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    written.rename(folder / written.name)
    _sync(folder)
    for old in checkpoints(folder):
        if step_of(old) not in (step, best):
            old.rename(folder / UNFINISHED / f"old-{step_of(old)}")
    shutil.rmtree(folder / UNFINISHED)


@contextmanager
def kept_if_it_fails() -> Iterator[str]:
    """A temporary directory for checkpoints, which stays where a training ends by an error: the last is all there is.

    The error names it.
    """
    made = Path(tempfile.mkdtemp(prefix="saap-recover-"))
    done = False
    try:
        yield str(made)
        done = True
    finally:
        if done or last_checkpoint(made) is None:
            shutil.rmtree(made, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the names in a directory last over a loss of power, where the system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
