"""Where block streaming keeps hidden states between blocks: in host memory, or in files of a folder."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from saap.memory import available_bytes

CPU = torch.device("cpu")


class HiddenStates:
    """``count`` tensors of one shape on the host, written and read by rows.

    With a ``folder`` each is a mapped file of an unnamed directory in it: the system writes its pages to
    disk when memory is short. None chooses: memory if they take less than a quarter of what is available,
    otherwise the folder for temporary files. Raises OSError when the folder has too little space.
    """

    def __init__(
        self, count: int, shape: tuple[int, ...], dtype: torch.dtype, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.bytes = count * torch.Size(shape).numel() * dtype.itemsize
        if folder is None and self.bytes > 0.25 * available_bytes(CPU):
            folder = tempfile.gettempdir()
        self._directory: Path | None = None if folder is None else _directory(Path(folder), self.bytes)
        self._shape, self._dtype = shape, dtype
        self._tensors: dict[int, Tensor] = {}

    def __getitem__(self, index: int) -> Tensor:
        if index not in self._tensors:
            self._tensors[index] = self._make(index)
        return self._tensors[index]

    def _make(self, index: int) -> Tensor:
        if self._directory is None:
            return torch.empty(self._shape, dtype=self._dtype)
        size = torch.Size(self._shape).numel()
        file = str(self._directory / f"{index}")
        return torch.from_file(file, shared=True, size=size, dtype=self._dtype).view(self._shape)

    def drop(self, index: int) -> None:
        """Free one tensor's memory or file."""
        self._tensors.pop(index, None)
        if self._directory is not None:
            (self._directory / f"{index}").unlink(missing_ok=True)

    def close(self) -> None:
        """Free everything; may be called twice."""
        self._tensors.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _directory(folder: Path, needed: int) -> Path:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"hidden states of all blocks need {needed:,} bytes, found {free:,} free in {folder}")
    return Path(tempfile.mkdtemp(prefix="saap-hidden-", dir=folder))
