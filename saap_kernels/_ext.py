"""The compiled module and Triton, loaded once, or the reason why they are not there."""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType


@cache
def _load() -> tuple[ModuleType | None, str]:
    import torch  # noqa: F401  loads torch's OpenMP runtime first, so that the compiled module shares its threads

    try:
        from saap_kernels import _C  # type: ignore[attr-defined]  # the compiled module has no stubs
    except ImportError as error:
        return None, f"the compiled module is not there ({error}); install with a C++ compiler: pip install ."
    return _C, "ok"


def native() -> ModuleType | None:
    """The compiled module, or None."""
    return _load()[0]


def why_no_native() -> str:
    """One line saying why ``native()`` is None; "ok" when it is not."""
    return _load()[1]


@cache
def cuda_status(device: int | None = None) -> tuple[bool, str]:
    """Whether the CUDA kernels can run on a CUDA device, by its index (None: the current one), and why not."""
    module, reason = _load()
    if module is None:
        return False, reason
    if not module.cuda_built:
        return False, "built without CUDA: nvcc was not found, or SAAP_BUILD_CUDA=0"
    import torch

    if not torch.cuda.is_available():
        return False, "no CUDA device or driver that this torch can use"
    driver, runtime = module.cuda_versions()
    if driver // 1000 < runtime // 1000:  # within a major version, older drivers run newer runtimes
        needed = f"built with CUDA {_version(runtime)}, which needs a driver for CUDA {runtime // 1000}.0 or newer"
        return False, f"{needed}; found one for CUDA {_version(driver)}"
    index = torch.cuda.current_device() if device is None else device
    with torch.cuda.device(index):
        error = module.cuda_image_error()
    if error:
        built = ", ".join(f"sm_{arch}" for arch in module.cuda_archs.split(";"))
        major, minor = torch.cuda.get_device_capability(index)
        return False, f"built for {built}; device {index} is sm_{major}{minor} ({error})"
    return True, "ok"


def _version(number: int) -> str:
    """ "13.0" for 13000, as CUDA writes versions."""
    return f"{number // 1000}.{number % 1000 // 10}"


def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_status() -> tuple[bool, str]:
    """Whether the Triton kernels can run here, and why not."""
    if find_spec("triton") is None:
        return False, "triton is not installed"
    import torch

    if not triton_interprets() and not torch.cuda.is_available():
        return False, "no CUDA device or driver that this torch can use (TRITON_INTERPRET=1 interprets on the CPU)"
    return True, "ok"
