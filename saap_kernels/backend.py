"""Which implementation runs: chosen from the tensor, overridden by name, explained on request."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from torch import Tensor

from saap_kernels import _ext

BACKENDS = ("reference", "library", "cpu", "triton", "cuda")  # library: torch's GEMM, of the inference ops
_chosen: ContextVar[str | None] = ContextVar("saap_backend", default=None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run ops on the named backend inside the context; None leaves the choice as it is.

    Raises ValueError for unknown names and RuntimeError, saying why, for one that cannot run here.
    """
    if name is None:
        yield
        return
    _check(name, "backend")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def available_backends() -> dict[str, str]:
    """{backend: "ok" or the reason why it cannot run here}."""
    return {name: _status(name) for name in BACKENDS}


def _status(name: str, device: int | None = None) -> str:
    """ "ok" or why a backend cannot run here; ``device``: index of the CUDA device, None for the current one."""
    if name == "cpu":
        return _ext.why_no_native()
    if name == "triton":
        return _ext.triton_status()[1]
    return _ext.cuda_status(device)[1] if name == "cuda" else "ok"


def requested() -> str | None:
    """The backend asked for by ``use_backend`` or by the environment variable SAAP_BACKEND."""
    name = _chosen.get()
    if name is None:
        name = os.environ.get("SAAP_BACKEND") or None
        if name is not None:
            _check(name, "SAAP_BACKEND")
    return name


Takes = dict[str, tuple[Callable[[Tensor], bool], str]]  # {backend: (whether it takes a tensor, which it takes)}
CALIBRATION: Takes = {
    "reference": (lambda t: True, "any tensors"),
    "cpu": (lambda t: str(t.device) == "cpu" and t.dtype.itemsize == 4, "fp32 tensors on the CPU"),
    "triton": (
        lambda t: t.dtype.itemsize <= 4 and (t.is_cuda or _ext.triton_interprets()),
        "fp16, bf16 or fp32 CUDA tensors (fp16 or fp32 CPU tensors with TRITON_INTERPRET=1)",
    ),
    "cuda": (lambda t: t.is_cuda and t.dtype.itemsize <= 4, "fp16, bf16 or fp32 CUDA tensors"),
}
INFERENCE: Takes = CALIBRATION | {
    "library": (lambda t: True, "any tensors"),
    "cpu": (lambda t: str(t.device) == "cpu" and t.dtype.itemsize <= 4, "fp16, bf16 or fp32 tensors on the CPU"),
}


def choose(op: str, implemented: Sequence[str], *tensors: Tensor, takes: Takes = CALIBRATION) -> str:
    """The backend that runs ``op``: the one asked for, or the first of ``implemented`` that fits and works.

    Warns, once per reason, when that leaves only plain torch for CUDA tensors. Raises ValueError when the one
    asked for does not implement ``op`` or does not take these tensors, RuntimeError when it has no code for their
    device.
    """
    asked, device = requested(), tensors[0].device
    if asked is None:
        found = next((name for name in implemented if not refusal(name, tensors, takes)), "reference")
        if found == "reference" and tensors[0].is_cuda:
            on_gpu = [name for name in implemented if name in ("triton", "cuda")]
            warn_of_reference("; ".join(f"{name}: {refusal(name, tensors, takes)}" for name in on_gpu))
        return found
    if asked not in implemented:
        raise ValueError(f"{op}: expected a backend among {', '.join(implemented)}, got {asked}")
    fits, taken = takes[asked]
    if not all(fits(t) for t in tensors):
        raise ValueError(f"{op}: backend {asked} takes {taken}, got {tensors[0].dtype} on {device}")
    reason = _status(asked, device.index)
    if reason != "ok":  # the check by name was of the current device
        raise RuntimeError(f"{op}: {asked} cannot run on {device}: {reason}")
    return asked


def refusal(name: str, tensors: Sequence[Tensor], takes: Takes) -> str:
    """Why a backend does not run these tensors without having been asked for; empty when it does."""
    fits, taken = takes[name]
    unfit = next((t for t in tensors if not fits(t)), None)
    if unfit is not None:
        return f"takes {taken}, got {unfit.dtype}"
    reason = _status(name, tensors[0].device.index)
    if reason == "ok" and name == "triton" and _ext.triton_interprets():
        return "interpreted (TRITON_INTERPRET=1), which is for tests"
    return "" if reason == "ok" else reason


@cache
def warn_of_reference(reasons: str) -> None:
    warnings.warn(f"CUDA tensors run in plain torch, many times slower: {reasons}", stacklevel=3)


def _check(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = _status(name)
    if reason != "ok":
        raise RuntimeError(f"{source}: {name} cannot run here: {reason}")
