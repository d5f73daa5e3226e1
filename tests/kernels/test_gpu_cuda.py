"""The CUDA C++ kernels on a device: the cases that test_cuda_emulated.py runs on the host."""

import pytest
import torch

from saap_kernels import _ext
from tests.kernels.cuda_cases import *  # noqa: F403  every case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_cuda_part_is_built() -> None:
    assert _ext.cuda_status() == (True, "ok")
