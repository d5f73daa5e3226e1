"""The Triton kernels on a device, with bf16: the cases that are interpreted without one."""

import pytest
import torch

from tests.kernels.triton_cases import *  # noqa: F403  every case
from tests.kernels.triton_linear_cases import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
