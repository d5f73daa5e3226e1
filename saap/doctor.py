"""What works on this machine, and why the rest does not."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import saap_kernels
from saap.families import known_families
from saap.memory import available_bytes
from saap.version import __version__
from saap_kernels import _ext

OPTIONAL = {"datasets": "hub:... data", "peft": "LoRA on pruned models"}


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
        "families": list(known_families()),
    }
