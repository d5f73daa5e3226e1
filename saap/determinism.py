"""Deterministic kernels for a backward pass: without this, attention on a GPU adds gradients in any order."""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import deterministic

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_settings: Any = deterministic  # a module whose stubs lack its one attribute


def ask_cublas() -> None:
    """Set the workspaces with which cuBLAS is deterministic, unless the user chose; read once, at the first product.

    Called where a model moves to a GPU, so that products before the calibration do not decide otherwise. On
    Hopper they have the size that torch would choose (32 MiB).
    """
    os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Make torch use deterministic kernels on a CUDA device; its settings are as found afterwards.

    In strict mode flash and memory-efficient attention add gradients in order and cuDNN's is not chosen; with
    ``warn_only`` they would warn and go on. Strict mode also demands cuBLAS's variable: in a process whose first
    product came before ``ask_cublas``, attention runs in plain torch instead, with a warning, since it takes
    more memory. An operation of the model that has no deterministic form raises torch's RuntimeError naming it.
    Kernels on a CPU are deterministic as they are.
    """
    if device.type != "cuda":
        yield
        return
    ask_cublas()
    with _restored(), ExitStack() as stack:
        _settings.fill_uninitialized_memory = False  # new tensors stay unfilled: ours are written whole
        torch.use_deterministic_algorithms(True)
        if not _cublas_takes_part(device):
            torch.use_deterministic_algorithms(True, warn_only=True)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            warnings.warn(
                f"a product ran on the GPU before {CUBLAS_VARIABLE} was set: attention takes its plain form, and more "
                f"memory; to avoid it start with {CUBLAS_VARIABLE}=:4096:8",
                stacklevel=4,
            )
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*CuBLAS.*", category=UserWarning)  # it has one stream here
        yield


@contextmanager
def _restored() -> Iterator[None]:
    """torch's settings of determinism, as found when the context closes."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _settings.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _settings.fill_uninitialized_memory = fill


def _cublas_takes_part(device: torch.device) -> bool:
    """Whether strict mode lets cuBLAS run in this process, asked by a small product."""
    one = torch.ones(16, 16, device=device)
    try:
        one @ one
    except RuntimeError as error:
        if CUBLAS_VARIABLE not in str(error):
            raise
        return False
    return True
