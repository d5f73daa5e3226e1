"""The context of a kernel launch: the tensors' device is current, and errors carry the kernel's name."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def launching(name: str, device: torch.device) -> Iterator[None]:
    """Make ``device`` current; an error inside, other than out of memory, is raised as RuntimeError naming the kernel.

    Kernels on CPU tensors are interpreted or emulated, in tests.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except _failures() as error:
            raise RuntimeError(f"{name} on {device}: {error}") from error


def _failures() -> tuple[type[Exception], ...]:
    """RuntimeError, and Triton's errors, which are none: that a device has too little shared memory is one."""
    module = sys.modules.get("triton.errors")  # whoever raised such an error has loaded Triton
    return (RuntimeError,) if module is None else (RuntimeError, module.TritonError)
