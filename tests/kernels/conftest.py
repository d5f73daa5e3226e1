"""Scratch memory starts as NaN, so that a kernel that reads what it never wrote is caught."""

import os

import pytest
import torch

# read once, at the process's first product, which may be any test's: calibration on a device needs it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["SAAP_SWITCH_POINTS"] = os.path.join(
    os.path.dirname(__file__), "none.json"
)  # what was measured here is not tested
with torch.device("meta"):
    torch.empty(0)  # torch notes its constructors at the first of these contexts: it must not note the one below


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """torch.empty and Tensor.new_empty return NaN for floating-point tensors during every kernel test."""

    def poisoned(real):
        def empty(*args, **kwargs):
            tensor = real(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
