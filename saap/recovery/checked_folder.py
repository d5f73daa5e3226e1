"""What can be said of a folder of checkpoints before anything is loaded: whether it is free, or whole to go on from."""

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from saap.distributed import launched
from saap.recovery.history import best_step
from saap.recovery.training_folder import (
    LEARNED,
    PREFIX,
    Record,
    checkpoints,
    last_checkpoint,
    read_log,
    refuse_differences,
    refuse_none_to_finish,
    step_of,
)

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # transformers' names, as are the next two
RANDOM, RANDOM_OF = "rng_state.pth", "rng_state_{}.pth"  # of one process, and of each of several
# what zipfile, zlib and safetensors raise for files that were cut, emptied or changed
NOT_WHOLE = (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error, SafetensorError)


def check_folder(folder: str | os.PathLike[str] | None, resume: bool, settings: Record, finish: bool = False) -> None:
    """Raise unless ``folder`` is free for checkpoints, or holds those of a training by ``settings`` to go on from.

    Files that ``resume``, or ``finish``, needs and that are damaged are named, with what can be done then.
    """
    if folder is None:
        if resume or finish:
            raise ValueError("resume and finish go on from the checkpoints of a folder: expected folder, got none")
        if launched()[1] > 1:
            raise ValueError("several processes share their checkpoints: expected folder, got none")
        return
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; expected a directory for checkpoints")
    if resume or finish:
        if not path.is_dir():
            raise FileNotFoundError(
                f"no training to go on from: there is no {path}; start without resume (--resume) or finish (--finish)"
            )
        refuse_differences(path, {"settings": settings})
        refuse_none_to_finish(path, finish)
        if launched()[0] == 0:
            refuse_damaged(path, states=not finish)
    elif path.is_dir() and any(path.iterdir()) and launched()[0] == 0:
        raise FileExistsError(
            f"{path} holds an earlier training: go on with resume (--resume), or use force (--force) to start anew"
        )


def refuse_damaged(folder: Path, states: bool) -> None:
    """Raise for a checkpoint of ``folder`` that is not whole; of optimizer, schedule and random numbers by ``states``.

    ValueError names the file that is damaged, FileNotFoundError the one that is missing.
    """
    last = last_checkpoint(folder)
    for checkpoint in sorted(checkpoints(folder), key=step_of):
        _check(checkpoint / LEARNED, _open_tensors, last)
    if last is None:
        return
    try:
        log = read_log(last)
    except (ValueError, FileNotFoundError) as error:  # which name the file
        raise type(error)(f"{error}: {_way_out(last, last)}") from error
    # the log may speak of a better step than any that is there
    _check(folder / f"{PREFIX}{best_step(log, step_of(last))}" / LEARNED, _open_tensors, last)
    if states:
        random = _random_states(last)
        optimizer = [] if step_of(last) == 0 else [OPTIMIZER]  # a sharded one has no state before its first step
        for name in (*optimizer, SCHEDULER, *random):
            _check(last / name, _read_zip, last, ", or finish (--finish), which does without it")


def _way_out(checkpoint: Path, last: Path | None) -> str:
    before = [each for each in checkpoints(checkpoint.parent) if step_of(each) < step_of(checkpoint)]
    if checkpoint == last and before:  # of an earlier one, which is the best, the log of the last speaks
        return f"remove {checkpoint} to go on from {max(before, key=step_of).name}"
    return f"remove {checkpoint.parent} to start again"


def _check(file: Path, read: Callable[[Path], Any], last: Path | None, otherwise: str = "") -> None:
    way = _way_out(file.parent, last)
    try:
        read(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: {way}{otherwise}") from None
    except NOT_WHOLE as error:
        raise ValueError(f"{file} is damaged: {error}: {way}{otherwise}") from error


def _open_tensors(file: Path) -> None:
    with safe_open(file, "pt") as tensors:  # its header, and whether all that it tells of is there
        tensors.keys()


def _read_zip(file: Path) -> None:
    """Compare every part of what torch has saved with its check sum; nothing is kept in memory."""
    with zipfile.ZipFile(file) as parts:
        bad = parts.testzip()
    if bad is not None:
        raise ValueError(f"the check sum of {bad} in it does not hold")


def _random_states(checkpoint: Path) -> list[str]:
    """Names of the files that should be there: as many as there were processes, of which there may be others now."""
    numbers = [file.stem.removeprefix("rng_state_") for file in checkpoint.glob(RANDOM_OF.format("*"))]
    if numbers and not (checkpoint / RANDOM).exists():
        return [RANDOM_OF.format(index) for index in range(max(2, 1 + max(map(int, numbers))))]
    return [RANDOM]
