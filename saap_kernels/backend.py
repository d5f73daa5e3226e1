"""Which implementation runs: chosen from the tensor, overridden by name, explained on request."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from saap_kernels import _ext

BACKENDS = ("reference", "cpu", "cuda")
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
    built, reason = _ext.cuda_status()
    return {
        "reference": "ok",
        "cpu": "ok" if _ext.native() is not None else _ext.why_no_native(),
        "cuda": "ok" if built else reason,
    }


def requested() -> str | None:
    """The backend asked for by ``use_backend`` or by the environment variable SAAP_BACKEND."""
    name = _chosen.get()
    if name is None:
        name = os.environ.get("SAAP_BACKEND") or None
        if name is not None:
            _check(name, "SAAP_BACKEND")
    return name


def use_native_cpu(op: str, *tensors: Tensor) -> bool:
    """Whether ``op`` runs the C++ kernel: fp32 on the CPU, unless another backend was asked for."""
    fits = all(str(t.device) == "cpu" and t.dtype.itemsize == 4 for t in tensors)
    asked = requested()
    if asked == "cpu" and not fits:
        raise ValueError(
            f"{op}: backend cpu takes fp32 tensors on the CPU, got {tensors[0].dtype} on {tensors[0].device}"
        )
    if asked is None:
        return fits and _ext.native() is not None
    return asked == "cpu"


def use_native_cuda(op: str, *tensors: Tensor) -> bool:
    """Whether ``op`` runs the CUDA kernel: any fp16, bf16 or fp32 CUDA tensor, unless another was asked for."""
    fits = all(t.is_cuda and t.dtype.itemsize <= 4 for t in tensors)
    asked = requested()
    if asked == "cuda" and not fits:
        raise ValueError(
            f"{op}: backend cuda takes fp16, bf16 or fp32 CUDA tensors, got {tensors[0].dtype} on {tensors[0].device}"
        )
    if asked is None:
        return fits and _ext.cuda_status()[0]
    return asked == "cuda"


def _check(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = available_backends()[name]
    if reason != "ok":
        raise RuntimeError(f"{source}: {name} cannot run here: {reason}")
