"""The cases of a device, on the CPU: what they do is known to work before one is at hand."""

import pytest
import torch

from tests.kernels.device_cases import *  # noqa: F403  every case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs them on the device")
