"""The library's path and switch points on a device: every dtype, graphs, and measuring."""

import pytest
import torch

from saap_kernels import gated_linear, gated_mlp, linear, measure_switch_points, switch_points, use_backend
from saap_kernels.packed import pack
from saap_kernels.switch_points import measure
from tests.kernels import linear_oracles as oracles
from tests.kernels.linear_oracles import SHAPES, assert_as_exact_as_eager
from tests.kernels.test_inference_ops import case, eager
from tests.kernels.triton_gating_cases import *  # noqa: F403  every case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_device(x, packed, bias):
    return x.cuda(), packed.to("cuda"), bias.cuda()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_library(shape, dtype, bits) -> None:
    operands = on_device(*case(shape, dtype, bits))
    with use_backend("library"):
        found = linear(*operands)
    assert found.is_contiguous()
    assert_as_exact_as_eager(found, eager(linear, *operands), oracles.linear(*operands))
    operands = on_device(*case(shape, dtype, bits, gated=True))
    with use_backend("library"):
        found = gated_linear(*operands, activation="silu")
    exact = oracles.gated_linear(*operands, activation="silu")
    assert_as_exact_as_eager(found, eager(gated_linear, *operands, activation="silu"), exact)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_chosen_paths_are_captured_in_a_graph(tokens, bits) -> None:
    x, up, bias = on_device(*case((tokens, 131, 72), torch.bfloat16, bits, gated=True))
    down = pack(torch.randn(72, 131, device="cuda").bfloat16(), bits=bits)
    wanted = gated_mlp(x, up, down, bias, activation="silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gated_mlp(x, up, down, bias, activation="silu")
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)


def test_measuring_on_the_device(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SAAP_SWITCH_POINTS", str(tmp_path / "points.json"))
    monkeypatch.setattr(measure, "SHAPES", {"linear": ((1024, 4096),), "gated_linear": ((555, 4096),)})
    try:
        found = measure_switch_points("cuda", quick=True)
        assert all(rungs[-1][0] is None for rungs in found.values())
        assert switch_points.status("cuda").startswith("measured" if found else "not measured")
        test_the_library((17, 131, 127), torch.bfloat16, 4)
    finally:
        switch_points.forget()
