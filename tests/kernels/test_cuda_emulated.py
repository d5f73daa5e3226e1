"""The CUDA C++ kernels on the host: csrc/ compiled with an emulator of threads, barriers, copies and collectives."""

import pytest

from saap_kernels import _ext
from tests.kernels.cuda_cases import *  # noqa: F403  every case
from tests.kernels.emulator.build import build_emulated


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    module = build_emulated(tmp_path_factory.mktemp("emulated"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ext, "native", lambda: module)
        yield module


def test_a_failed_launch_carries_the_name_of_the_kernel(emulated) -> None:
    arguments = [0] * 6 + [0, 0, 0, 8, 8, 0, 0, 1.0]
    with pytest.raises(RuntimeError, match="^weight_salience: invalid argument$"):
        emulated.weight_salience(*arguments, False, [0, 1, 2], 0, 9, 0, 0)
    with pytest.raises(RuntimeError, match="^coupled_salience: invalid argument$"):
        emulated.weight_salience(*arguments, True, [0, 1, 2], 0, 9, 0, 0)
    with pytest.raises(RuntimeError, match="^activation_planes: invalid argument$"):
        emulated.activation_planes(0, 0, 0, 0, 0, 0, 0, 0, 1, 8, [0, -1, -1, -1], 1, 9, 0, 0, 0)
