"""Tables per device: rows merged by task and case, written after every row, so that an interruption loses nothing."""

import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row

Key = tuple[str, str, str]  # task, case, unit


class Results:
    """``DEVICE.json`` and ``DEVICE.md`` in a folder; rows of other versions of torch or Triton are replaced as a whole.

    The rows of a task replace those that an earlier run of it left; other tasks' rows stay. One process at a
    time may write.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{re.sub(r'[^a-z0-9]+', '-', hardware_name().lower()).strip('-')}.json"
        self.versions = f"torch {torch.__version__}, triton {triton_version()}"
        self.rows: dict[Key, dict[str, Any]] = {}
        self.finished: list[str] = []  # tasks measured whole
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["versions"] == self.versions:
                self.rows = {(row["task"], row["case"], row["unit"]): row for row in found["rows"]}
                self.finished = found["finished"]

    def add(self, task: str, row: Row) -> None:
        self.rows[task, row.case, row.unit] = asdict(row) | {"task": task, "date": str(date.today())}
        self._write()

    def finish(self, task: str, rows: Iterable[Row]) -> None:
        """All of ``task`` is measured: what it no longer has leaves the table."""
        now = {(task, row.case, row.unit) for row in rows}
        self.rows = {key: row for key, row in self.rows.items() if key[0] != task or key in now}
        self.finished = [*(name for name in self.finished if name != task), task]
        self._write()

    def _write(self) -> None:
        rows = list(self.rows.values())
        found = {"device": hardware_name(), "versions": self.versions, "finished": self.finished, "rows": rows}
        write_whole(self.path, json.dumps(found, indent=1) + "\n")
        write_whole(self.path.with_suffix(".md"), markdown(rows, self.versions))


def markdown(rows: Sequence[dict[str, Any]], versions: str) -> str:
    """The table of all rows, under the device, the versions and the days."""
    days = sorted({row["date"] for row in rows})
    lines = [
        f"# {hardware_name()}",
        "",
        f"{versions}, {' to '.join(sorted({days[0], days[-1]}))}; `python -m benchmarks.run`",
    ]
    lines += ["", "| case | ours | peer | ratio | unit | asked |", "|---|---|---|---|---|---|"]
    for row in rows:
        peer, ratio = ("" if row[name] is None else f"{row[name]:.3f}" for name in ("peer", "ratio"))
        lines.append(f"| {row['case']} | {row['ours']:.3f} | {peer} | {ratio} | {row['unit']} | {row['asked']} |")
    return "\n".join(lines) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a kill, meets the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    os.replace(beside, path)


def hardware_name() -> str:
    """The CUDA device's name, or the processor's architecture and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.get_num_threads()} threads"


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"
