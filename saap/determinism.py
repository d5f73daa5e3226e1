"""Deterministic kernels for a backward pass: without this, attention on a GPU adds gradients in any order."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic

_settings: Any = deterministic  # a module whose stubs lack its one attribute


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Ask torch for deterministic kernels on a CUDA device; the settings are as found afterwards.

    torch would warn of cuBLAS, which orders sums otherwise only under several streams, and fill every new
    tensor: neither is wanted here. Kernels on a CPU are deterministic as they are.
    """
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    _settings.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _settings.fill_uninitialized_memory = fill
