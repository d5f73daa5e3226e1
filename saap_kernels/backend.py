"""Which implementation runs: chosen from the tensor, overridden by name, explained on request."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from saap_kernels import _ext

BACKENDS = ("reference", "cpu", "triton", "cuda")
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
    triton, why_not = _ext.triton_status()
    return {
        "reference": "ok",
        "cpu": "ok" if _ext.native() is not None else _ext.why_no_native(),
        "triton": "ok" if triton else why_not,
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


_FITS: dict[str, tuple[Callable[[Tensor], bool], str]] = {
    "reference": (lambda t: True, "any tensors"),
    "cpu": (lambda t: str(t.device) == "cpu" and t.dtype.itemsize == 4, "fp32 tensors on the CPU"),
    "triton": (
        lambda t: t.dtype.itemsize <= 4 and (t.is_cuda or _ext.triton_interprets()),
        "fp16, bf16 or fp32 CUDA tensors (fp16 or fp32 CPU tensors with TRITON_INTERPRET=1)",
    ),
    "cuda": (lambda t: t.is_cuda and t.dtype.itemsize <= 4, "fp16, bf16 or fp32 CUDA tensors"),
}


def choose(op: str, implemented: Sequence[str], *tensors: Tensor) -> str:
    """The backend that runs ``op``: the one asked for, or the first of ``implemented`` that fits and works.

    Raises ValueError when the one asked for does not implement ``op`` or does not take these tensors.
    """
    asked = requested()
    if asked is None:
        working = (name for name in implemented if _runs(name) and all(_FITS[name][0](t) for t in tensors))
        return next(working, "reference")
    if asked not in implemented:
        raise ValueError(f"{op}: expected a backend among {', '.join(implemented)}, got {asked}")
    fits, takes = _FITS[asked]
    if not all(fits(t) for t in tensors):
        raise ValueError(f"{op}: backend {asked} takes {takes}, got {tensors[0].dtype} on {tensors[0].device}")
    return asked


def _runs(name: str) -> bool:
    """Whether a backend works here without having been asked for (the Triton interpreter is for tests)."""
    if name == "cpu":
        return _ext.native() is not None
    if name == "cuda":
        return _ext.cuda_status()[0]
    if name == "triton":
        return _ext.triton_status()[0] and not _ext.triton_interprets()
    return True


def _check(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = available_backends()[name]
    if reason != "ok":
        raise RuntimeError(f"{source}: {name} cannot run here: {reason}")
