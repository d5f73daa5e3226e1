"""Inference kernels on a device: what only it can show, graphs and sizes."""

import pytest
import torch

from saap_kernels import PackedWeight, cuda_linear, gated_mlp, pack, triton_linear, use_backend
from tests.kernels import linear_oracles as oracles
from tests.kernels.linear_oracles import assert_as_exact_as_eager
from tests.kernels.test_inference_ops import case, eager

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
every_module = pytest.mark.parametrize("module", [triton_linear, cuda_linear], ids=["triton", "cuda"])


@every_module
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_products_are_captured_in_a_graph_and_the_same_at_every_replay(tokens, bits, module) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    up = pack(torch.randn(2, 1407, 2048, **options) / 45, bits=bits)
    down = pack(torch.randn(2048, 1407, **options) / 37, bits=bits)
    x = torch.randn(tokens, 2048, **options)

    def mlp() -> torch.Tensor:
        return module.linear_of_padded(module.gated_linear(x, up, None, "silu"), down, None)

    wanted, graph = mlp(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = mlp()
    for _ in range(2):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)


@every_module
def test_weights_and_tokens_of_more_than_two_to_the_31_elements(module) -> None:
    rows, columns = 2**17, 2**14 + 128  # only the last row of the weight is not zero
    data = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    data[-1] = 1
    x = torch.ones(2, columns, dtype=torch.bfloat16, device="cuda")
    found = module.linear(x, PackedWeight(data, (rows, columns), 16), None)
    assert not found[:, :-1].any() and (found[:, -1] == columns).all()  # 16512 is a bf16 number
    far = torch.full((2**31 + columns,), torch.nan, dtype=torch.bfloat16, device="cuda").as_strided(x.shape, (2**31, 1))
    far.copy_(x)
    assert torch.equal(module.linear(far, PackedWeight(data, (rows, columns), 16), None), found)


@pytest.mark.parametrize("backend", ["triton", "cuda", None])  # None: what is chosen unasked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 200])
def test_a_gated_mlp_by_every_backend(tokens, bits, dtype, backend) -> None:
    x, up, up_bias = case((tokens, 1407, 640), dtype, bits, gated=True)
    _, down, down_bias = case((tokens, 640, 1407), dtype, bits)
    operands = x.cuda(), up.to("cuda"), down.to("cuda"), up_bias.cuda(), down_bias.cuda()
    with use_backend(backend):
        found = gated_mlp(*operands, activation="silu")
    exact = oracles.gated_mlp(*operands, activation="silu")
    assert_as_exact_as_eager(found, eager(gated_mlp, *operands, activation="silu"), exact)
