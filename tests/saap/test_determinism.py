"""Settings of deterministic kernels: strict on a GPU, plain attention where strictness is refused, restored after."""

import os

import pytest
import torch
from torch.utils import deterministic

from saap import determinism
from saap.determinism import CUBLAS_VARIABLE, ask_cublas, deterministic_kernels

GPU = torch.device("cuda")


def settings() -> tuple[bool, ...]:
    """Strict, warns only, fills new tensors; flash, memory-efficient and plain attention allowed."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


@pytest.fixture
def asked(monkeypatch):
    """Lets a test say whether strict mode lets cuBLAS run, where there is no device to ask."""
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    return lambda answer: monkeypatch.setattr(determinism, "_cublas_takes_part", lambda device: answer)


def test_a_cpu_needs_no_setting(asked) -> None:
    before = settings()
    with deterministic_kernels(torch.device("cpu")):
        assert settings() == before and CUBLAS_VARIABLE not in os.environ


def test_a_gpu_is_strict_and_the_settings_come_back_after_an_exception(asked) -> None:
    asked(True)
    before = settings()
    with pytest.raises(KeyError), deterministic_kernels(GPU):
        # warn_only=False: only then flash attention adds in order and cuDNN's is refused
        assert settings() == (True, False, False, True, True, True)
        assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
        raise KeyError
    assert settings() == before == (False, False, True, True, True, True)


def test_without_strict_cublas_attention_is_plain_and_a_warning_says_why(asked) -> None:
    asked(False)
    before = settings()
    with pytest.warns(UserWarning, match=f"{CUBLAS_VARIABLE} was set: attention takes its plain form"):
        context = deterministic_kernels(GPU)
        context.__enter__()
    assert settings() == (True, True, False, False, False, True)
    context.__exit__(None, None, None)
    assert settings() == before


def test_the_users_own_settings_stay(asked, monkeypatch) -> None:
    asked(True)
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels(GPU):
            ask_cublas()
            assert os.environ[CUBLAS_VARIABLE] == ":16:8" and settings()[:2] == (True, False)
        assert settings()[:3] == (True, True, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("message", "strict"), [(f"set {CUBLAS_VARIABLE}=:4096:8", False), ("out of order", None)])
def test_only_the_refusal_of_cublas_counts_as_one(monkeypatch, message: str, strict: bool | None) -> None:
    def refuse(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "ones", lambda *_, **__: type("Failing", (), {"__matmul__": refuse})())
    if strict is None:
        with pytest.raises(RuntimeError, match="out of order"):
            determinism._cublas_takes_part(GPU)
    else:
        assert determinism._cublas_takes_part(GPU) is strict
