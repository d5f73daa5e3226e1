"""The CUDA C++ kernels on a device: the cases that test_cuda_emulated.py runs on the host."""

import pytest
import torch

from saap_kernels import _ext, cuda
from tests.kernels.cuda_cases import *  # noqa: F403  every case
from tests.kernels.cuda_linear_cases import *  # noqa: F403  every case
from tests.kernels.test_calibration_ops import problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_cuda_part_is_built() -> None:
    assert _ext.cuda_status() == (True, "ok")


def test_a_failed_launch_carries_the_name_of_the_kernel_and_breaks_nothing(monkeypatch) -> None:
    x, dy, w, _, spans = problem(17, 6, 9, torch.float16)
    there = [tensor.cuda() for tensor in (x, dy, w)]
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "DTYPES", {torch.float16: 9})  # what the kernels refuse
        with pytest.raises(RuntimeError, match="^weight_salience on cuda:0: invalid argument$"):
            cuda.weight_salience(*there, spans, "out", 1, None, ["abs"], 1.0)
        with pytest.raises(RuntimeError, match="^activation_planes on cuda:0: invalid argument$"):
            cuda.sums(there[0], there[0], spans, None, [])
    assert torch.isfinite(cuda.weight_salience(*there, spans, "out", 1, None, ["abs"], 1.0)).all()
