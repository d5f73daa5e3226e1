"""Which path runs the inference ops: a backend's kernel, or the library's GEMM where that is faster."""

import sys
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from saap_kernels import switch_points
from saap_kernels.backend import INFERENCE, choose, refusal, requested, warn_of_reference
from saap_kernels.packed import PackedWeight, of_layout
from saap_kernels.reference_linear import padded_width
from saap_kernels.switch_points import LIBRARY, Rungs


class Backend(NamedTuple):
    """A module with the functions of ``reference_linear``, imported when it is first to run, and what it takes."""

    module: str
    most_tokens: int | None = None  # its kernels go up to so many; None: to any number
    mixed: bool = False  # takes floating-point weights of another dtype than x

    def takes(self, x: Tensor, weight: PackedWeight) -> bool:
        if weight.scale is not None:
            return weight.scale.dtype != torch.float64
        return weight.data.dtype == x.dtype or (self.mixed and weight.data.dtype != torch.float64)


BACKENDS = {  # in order of preference; what a backend does not take runs the library
    "cuda": Backend("cuda_linear", most_tokens=16),
    "triton": Backend("triton_linear", mixed=True),
    "cpu": Backend("cpu_linear", mixed=True),
    LIBRARY: Backend("library_linear"),
    "reference": Backend("reference_linear"),
}
IMPLEMENTED = tuple(BACKENDS)
PLAIN = (LIBRARY, "reference")  # torch alone, which takes everything

Path = tuple[int, ModuleType]  # largest token count, and what runs up to it
_paths: dict[tuple[object, ...], tuple[Path, ...]] = {}


def linear(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, layout: list[int]
) -> Tensor:
    """(T, N) by the chosen path; arguments are checked."""
    weight = of_layout(data, scale, zero, layout)
    if not len(x):
        return x.new_empty(0, weight.rows)
    return chosen("linear", x, weight).linear(x, weight, bias)


def gated_linear(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, layout: list[int],
    activation: str,
) -> Tensor:  # fmt: skip
    """(T, F), a view of rows padded with zeros, by the chosen path; arguments are checked."""
    weight = of_layout(data, scale, zero, layout)
    if not len(x):
        return x.new_empty(0, padded_width(weight.rows))[:, : weight.rows]
    return chosen("gated_linear", x, weight).gated_linear(x, weight, bias, activation)[:, : weight.rows]


def gated_mlp(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, layout: list[int],
    down_data: Tensor, down_scale: Tensor | None, down_zero: Tensor | None, down_bias: Tensor | None,
    down_layout: list[int], activation: str,
) -> Tensor:  # fmt: skip
    """(T, D) by the chosen path of each product; arguments are checked."""
    gate_up, down = of_layout(data, scale, zero, layout), of_layout(down_data, down_scale, down_zero, down_layout)
    if not len(x):
        return x.new_empty(0, down.rows)
    h = chosen("gated_linear", x, gate_up).gated_linear(x, gate_up, bias, activation)
    return chosen("linear", h, down).linear_of_padded(h, down, down_bias)


def chosen(op: str, x: Tensor, weight: PackedWeight) -> ModuleType:
    """The module that runs ``op``: what is asked for, for as many tokens as it takes, or the measured path."""
    if requested() is not None:
        return _asked(op, x, weight)
    scale = weight.scale
    kind = (
        op, weight.shape, x.device, x.dtype, weight.data.dtype, None if scale is None else scale.dtype,
        torch.get_num_threads() if x.is_cpu else 0,
    )  # fmt: skip
    paths = _paths.get(kind)
    if paths is None:
        paths = _paths[kind] = _found_paths(op, x, weight)
    tokens = x.shape[0]
    for most, module in paths:
        if tokens <= most:
            return module
    raise AssertionError("the last path has no limit")


def forget() -> None:
    """Choose paths anew, after switch points were measured or their file changed."""
    _paths.clear()


def kernels_for(x: Tensor, weight: PackedWeight) -> dict[str, int | None]:
    """The backends other than plain torch that run this product here unasked, best first, and up to how many tokens."""
    return {
        name: backend.most_tokens
        for name, backend in BACKENDS.items()
        if name not in PLAIN and backend.takes(x, weight) and not refusal(name, (x,), INFERENCE)
    }


def module_of(name: str) -> ModuleType:
    """Of a backend, imported when it is first to run."""
    return import_module(f"saap_kernels.{BACKENDS[name].module}")


def _asked(op: str, x: Tensor, weight: PackedWeight) -> ModuleType:
    name = choose(op, IMPLEMENTED, x, takes=INFERENCE)
    backend = BACKENDS[name]
    beyond = backend.most_tokens is not None and len(x) > backend.most_tokens
    unfit = name not in PLAIN and not backend.takes(x, weight)
    return module_of(LIBRARY if beyond or unfit else name)


def _found_paths(op: str, x: Tensor, weight: PackedWeight) -> tuple[Path, ...]:
    """As measured, or by the rule where that is not known or cannot run here."""
    kernels = kernels_for(x, weight)
    if x.is_cuda and not kernels and weight.bits != 16:
        names = [name for name in ("cuda", "triton") if name in BACKENDS]
        warn_of_reference("; ".join(f"{name}: {refusal(name, (x,), INFERENCE)}" for name in names))
    rungs = switch_points.measured_rungs(op, x.device, x.dtype, weight)
    if rungs is None or not _can_run(rungs, kernels):
        rungs = switch_points.default_rungs(x.device, x.dtype, weight, kernels)
    return tuple((sys.maxsize if most is None else most, module_of(name)) for most, name in rungs)


def _can_run(rungs: Rungs, kernels: dict[str, int | None]) -> bool:
    """Whether every measured path still is one here, for as many tokens."""
    limits = {LIBRARY: None, **kernels}
    return all(
        name in limits and (limits[name] is None or (most or sys.maxsize) <= (limits[name] or 0))
        for most, name in rungs
    )
