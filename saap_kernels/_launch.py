"""The context of a kernel launch: the tensors' device is current, and errors carry the kernel's name."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def launching(name: str, device: torch.device) -> Iterator[None]:
    """Make ``device`` current; a RuntimeError inside, other than out of memory, is raised again naming the kernel.

    Kernels on CPU tensors are interpreted or emulated, in tests.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(f"{name} on {device}: {error}") from error
