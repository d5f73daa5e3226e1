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
        except (RuntimeError, *_triton_errors()) as error:
            raise RuntimeError(f"{name} on {device}: {error}") from error


def _triton_errors() -> tuple[type[Exception], ...]:
    """Triton's base error, which is no RuntimeError (too much shared memory for a device is one): whoever raised it
    has loaded Triton."""
    module = sys.modules.get("triton.errors")
    return () if module is None else (module.TritonError,)
