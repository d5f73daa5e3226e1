"""The CUDA C++ kernels on the host: csrc/ compiled with an emulator of threads, barriers, copies and collectives."""

import pytest
import torch

from saap_kernels import _ext, cuda, cuda_linear, pack
from tests.kernels import cuda_cases
from tests.kernels.cuda_cases import *  # noqa: F403  every case
from tests.kernels.cuda_linear_cases import *  # noqa: F403  every case
from tests.kernels.emulator.build import build_emulated
from tests.kernels.test_calibration_ops import problem


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    module = build_emulated(tmp_path_factory.mktemp("emulated"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ext, "native", lambda: module)
        patch.setattr(cuda_cases, "DEVICE", "cpu")  # also where there is a GPU: the emulator reads host memory
        yield module


def test_the_module_says_what_it_needs(emulated) -> None:
    assert emulated.cuda_versions() == (13010, 13000) and emulated.cuda_image_error() == ""


def test_a_failed_launch_carries_the_name_of_the_kernel(monkeypatch) -> None:
    x, dy, w, _, spans = problem(17, 6, 9, torch.float16)
    monkeypatch.setattr(cuda, "DTYPES", {torch.float16: 9})  # what the kernels refuse
    with pytest.raises(RuntimeError, match="^weight_salience on cpu: invalid argument$"):
        cuda.weight_salience(x, dy, w, spans, "out", 1, None, ["abs"], 1.0)
    with pytest.raises(RuntimeError, match="^coupled_salience on cpu: invalid argument$"):
        cuda.coupled_salience(x, dy, w, spans, "out", 1, None, ["first"], 1.0)
    with pytest.raises(RuntimeError, match="^activation_planes on cpu: invalid argument$"):
        cuda.sums(x, x, spans, None, [])
    monkeypatch.setattr(cuda_linear, "DTYPES", {torch.float16: 9})
    with pytest.raises(RuntimeError, match="^linear on cpu: invalid argument$"):
        cuda_linear.linear(x[:3], pack(w), None)
    with pytest.raises(RuntimeError, match="^gated_linear on cpu: invalid argument$"):
        cuda_linear.gated_linear(x[:3], pack(torch.stack([w, w])), None, "silu")
