"""The file of measured switch points: JSON in the user's cache, one entry per device, replaced as a whole."""

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

VERSION = 1
KIND = "saap switch points"

Rungs = tuple[tuple[int | None, str], ...]


def location() -> Path:
    """The file named by SAAP_SWITCH_POINTS, or the one in the user's cache."""
    named = os.environ.get("SAAP_SWITCH_POINTS")
    if named:
        return Path(named)
    cached = os.environ.get("XDG_CACHE_HOME")
    # the standard for these folders has relative ones ignored
    folder = Path(cached) if cached and Path(cached).is_absolute() else Path.home() / ".cache"
    return folder / "saap" / "switch_points.json"


def device_name(device: torch.device) -> str:
    """What a table is measured for: the GPU's model, or the processor's and torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # systems without that file
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read() -> dict[str, Mapping[str, Rungs]]:
    """{device: {kind of product: rungs}}; empty, with one warning that names it, for a file that is none of ours."""
    return {
        device: {kind: tuple((most, path) for most, path in rungs) for kind, rungs in entry["points"].items()}
        for device, entry in read_entries().items()
    }


def read_entries() -> dict[str, Any]:
    """{device: {"versions", "points"}} of the file, checked; empty where there is none, or none of ours."""
    path = location()
    try:
        return _checked(path)
    except ValueError as error:
        _warn(f"{path} is ignored: {error}")
        return {}


@cache
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def replaceable(path: Path) -> dict[str, Any]:
    """The entries that a new table at ``path`` keeps. Raises ValueError where it would replace a file of others."""
    try:
        return _checked(path)
    except OldVersion:
        return {}  # of no use to anyone
    except ValueError as error:
        raise ValueError(f"{path} is not replaced: {error}; remove it or name another file") from error


def write(path: Path, device: str, points: Mapping[str, Rungs]) -> None:
    """Put ``points`` in the place of what the file holds for ``device``; a reader meets the old file or the new one."""
    entries = replaceable(path)
    entries[device] = {"versions": versions(), "points": points}
    text = json.dumps({"kind": KIND, "version": VERSION, "devices": entries}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def versions() -> str:
    return f"torch {torch.__version__}"


class OldVersion(ValueError):
    """A table of another version of this format."""


def _checked(path: Path) -> dict[str, Any]:
    """The entries of a file of ours, {} where there is none. Raises ValueError saying what is wrong with it."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read ({error})") from error
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected JSON ({error})") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f'expected "kind": "{KIND}"')
    if found.get("version") != VERSION:
        raise OldVersion(f"expected version {VERSION}, got {found.get('version')!r}: measure again")
    devices = found.get("devices")
    if not isinstance(devices, dict):
        raise ValueError(f'expected "devices" to be an object, got {type(devices).__name__}')
    for name, entry in devices.items():
        _check_entry(name, entry)
    return devices


def _check_entry(name: str, entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("versions"), str):
        raise ValueError(f'expected "versions" of {name}')
    points = entry.get("points")
    if not isinstance(points, dict) or not all(_are_rungs(rungs) for rungs in points.values()):
        raise ValueError(f"expected rising token counts and paths under {name}, the last count null")


def _are_rungs(rungs: Any) -> bool:
    if not isinstance(rungs, list) or not rungs:
        return False
    if not all(isinstance(rung, list) and len(rung) == 2 and isinstance(rung[1], str) for rung in rungs):
        return False
    counts = [most for most, _ in rungs]
    whole = all(type(most) is int and most > 0 for most in counts[:-1])
    return whole and counts[-1] is None and all(low < high for low, high in zip(counts, counts[1:-1], strict=False))
