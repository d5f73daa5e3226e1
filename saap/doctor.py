"""What works on this machine, and why the rest does not."""

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import saap_kernels
from saap.accelerate import products_of
from saap.families import known_families
from saap.kernel_choice import timing
from saap.memory import available_bytes
from saap.model_info import skeleton
from saap.version import __version__
from saap_kernels import _ext, switch_points

OPTIONAL = {"datasets": "hub:... data", "peft": "LoRA on pruned models"}


@dataclass(frozen=True)
class ShapeChoice:
    """What ``accelerate`` would choose for one shape, a Linear (N, K) or a gated MLP (F, K, D), at one token.

    ``bits`` None: weights as they are. Seconds are those of the fastest call; ``choice`` is "saap" or "library".
    """

    kind: str
    shape: tuple[int, ...]
    modules: int
    bits: int | None
    library_seconds: float
    kernel_seconds: float
    choice: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shape_choices(folder: Path) -> Iterator[ShapeChoice]:
    """Time every distinct product of the model directory ``folder`` on this device, without loading its weights.

    Raises as ``model_info``.
    """
    model = skeleton(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for (kind, shape), modules in products_of(model).items():
        for bits in (None, 8, 4):
            found = timing(shape, bits, model.dtype, device)
            choice = "saap" if found.faster else "library"
            yield ShapeChoice(kind, shape, modules, bits, found.library, found.kernel, choice)


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def examine() -> dict[str, Any]:
    """Versions, devices, native module and backends, as plain values."""
    native = _ext.native()
    return {
        "saap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "optional": {name: f"{_version(name)} ({use})" for name, use in OPTIONAL.items()},
        "cpu": {
            "threads": torch.get_num_threads(),
            "memory available": f"{available_bytes(torch.device('cpu')) / 2**30:.1f} GiB",
        },
        "cuda devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native module": {
            "status": _ext.why_no_native(),
            "AVX2 code": bool(native and native.has_avx2()),
            "OpenMP": bool(native and native.openmp),
            "CUDA targets": native.cuda_archs if native and native.cuda_built else "none",
        },
        "backends": saap_kernels.available_backends(),
        "switch points": {device: switch_points.status(device) for device in _devices()},
        "families": list(known_families()),
    }
