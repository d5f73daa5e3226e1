"""Calibration and its memory on a CUDA device: the cases of device_cases.py, and what only a device can show."""

import os
import subprocess
import sys

import pytest
import torch

import saap
from saap.memory import available_bytes
from saap.micro_batches import fit_micro_batches
from tests.kernels.device_cases import *  # noqa: F403  every case
from tests.kernels.device_cases import assert_close, token_ids
from tests.saap.tiny import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TWICE = """
import sys, torch, saap
from tests.kernels.device_cases import token_ids
from tests.saap.test_calibrate import assert_same
from tests.saap.tiny import tiny_model
model = tiny_model("llama", torch.bfloat16, head_dim=64, max_position_embeddings=512).cuda()
if sys.argv[1] == "late":
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
ids = token_ids(4, 512)
first, second = (saap.calibrate(model, data=ids, samples=4, seq_len=512) for _ in range(2))
assert_same(first, second, rtol=0)
"""


@pytest.fixture
def little_memory():
    """Lets a test leave this process a few more bytes of the device than it holds; all of it afterwards."""
    total = torch.cuda.get_device_properties(0).total_memory

    def leave(size: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_running_out_of_memory_halves_the_micro_batch(little_memory) -> None:
    model, ids = tiny_model("llama", torch.float32).cuda(), token_ids(512, 64)
    options = {"data": ids, "samples": 512, "seq_len": 64, "checkpoint": False}
    whole = saap.calibrate(model, **options, batch_size=64)
    little_memory(128 << 20)  # autograd alone keeps 0.5 GB of 512 sequences
    with pytest.warns(UserWarning, match="out of device memory: going on with micro-batches"):
        halved = saap.calibrate(model, **options, batch_size=512)
    assert halved.sequences == 512
    assert_close(halved, whole, 1e-3)  # products of other sizes round otherwise


def test_the_automatic_micro_batch_keeps_to_the_free_memory() -> None:
    device, units = torch.device("cuda", 0), saap.discover(tiny_model("llama", torch.float32))
    free = available_bytes(device)
    fit = fit_micro_batches(units, 1 << 30, 64, torch.float32, device)  # more sequences than any device holds
    assert free / 8 <= fit.activation_bytes <= free


@pytest.mark.parametrize("first_product", ["early", "late"])
def test_attention_is_deterministic_whenever_the_first_product_ran(first_product: str) -> None:
    """Late: strict mode comes too late for cuBLAS in this process, and attention runs in plain torch."""
    command = [sys.executable, "-W", "always", "-c", TWICE, first_product]
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert ("attention takes its plain form" in done.stderr) == (first_product == "late")
