"""The Triton kernels on a device, with bf16: the cases that are interpreted without one, and what only it can show."""

import pytest
import torch

from saap_kernels import PackedWeight, pack, triton_linear
from tests.kernels.triton_cases import *  # noqa: F403  every case
from tests.kernels.triton_linear_cases import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_products_are_captured_in_a_graph_and_the_same_at_every_replay(tokens, bits) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    up = pack(torch.randn(2, 1407, 2048, **options) / 45, bits=bits)
    down = pack(torch.randn(2048, 1407, **options) / 37, bits=bits)
    x = torch.randn(tokens, 2048, **options)

    def mlp() -> torch.Tensor:
        return triton_linear.linear_of_padded(triton_linear.gated_linear(x, up, None, "silu"), down, None)

    wanted, graph = mlp(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = mlp()
    for _ in range(2):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)


def test_weights_and_tokens_of_more_than_two_to_the_31_elements() -> None:
    rows, columns = 2**17, 2**14 + 128  # only the last row of the weight is not zero
    data = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    data[-1] = 1
    x = torch.ones(2, columns, dtype=torch.bfloat16, device="cuda")
    found = triton_linear.linear(x, PackedWeight(data, (rows, columns), 16), None)
    assert not found[:, :-1].any() and (found[:, -1] == columns).all()  # 16512 is a bf16 number
    far = torch.full((2**31 + columns,), torch.nan, dtype=torch.bfloat16, device="cuda").as_strided(x.shape, (2**31, 1))
    far.copy_(x)
    assert torch.equal(triton_linear.linear(far, PackedWeight(data, (rows, columns), 16), None), found)
