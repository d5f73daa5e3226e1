"""Guards of speed on this machine's CPU: ratios of variants that alternate in one run, never absolute times.

Bounds are far from what is measured on a quiet machine, so that they catch a path that is lost, not a bad day.
``pytest tests/kernels/test_speed_guards.py --benchmark-json=FILE`` keeps the ratios.
"""

import pytest
import torch
from torch.nn import functional

from benchmarks.timing import interleave
from saap_kernels import gated_mlp, linear, pack, use_backend
from saap_kernels.products import IMPLEMENTED

ROWS, COLUMNS, SETS = 2047, 2049, 5  # odd widths; five weights of 16 MB in fp32 pass the caches of most machines
CHANCES = 4  # a machine that does something else at the time slows one variant or the other
needs_cpu_kernels = pytest.mark.skipif("cpu" not in IMPLEMENTED, reason="the CPU kernels of these ops are not there")


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def least_ratio(benchmark, ours, peer, bound):
    """The least of ``CHANCES`` ratios of medians, or the first below ``bound``."""
    ratios = []
    while len(ratios) < CHANCES and (not ratios or min(ratios) > bound):
        seconds = interleave({"ours": ours, "peer": peer}, 15, SETS, "cpu")
        ratios.append(seconds["ours"] / seconds["peer"])
    benchmark.extra_info["ratio"] = min(ratios)
    benchmark.pedantic(ours, args=(0,), rounds=5, warmup_rounds=1)
    return min(ratios)


@pytest.fixture(scope="module")
def weights():
    return [drawn(ROWS, COLUMNS) + index for index in range(SETS)]


@pytest.mark.parametrize(("tokens", "bound"), [(1, 1.5), (64, 1.4)])
def test_a_padded_weight_is_as_fast_as_a_contiguous_one(benchmark, weights, tokens, bound) -> None:
    x, packed = drawn(tokens, COLUMNS), [pack(weight) for weight in weights]
    ratio = least_ratio(benchmark, lambda i: linear(x, packed[i]), lambda i: functional.linear(x, weights[i]), bound)
    assert ratio <= bound


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_gated_mlp_is_as_fast_as_its_three_products(benchmark, tokens) -> None:
    x, gates, downs = drawn(tokens, 768), [drawn(2, 1023, 768) + i for i in range(SETS)], drawn(768, 1023)
    ups, down = [pack(gate) for gate in gates], pack(downs)

    def peer(index):
        gate, up = (functional.linear(x, each) for each in gates[index])
        return functional.linear(functional.silu(gate) * up, downs)

    ratio = least_ratio(benchmark, lambda i: gated_mlp(x, ups[i], down, activation="silu"), peer, 1.5)
    assert ratio <= 1.5


@pytest.mark.parametrize("bits", [8, 4])
def test_many_tokens_on_quantised_weights_do_not_pay_for_a_whole_copy(benchmark, weights, bits) -> None:
    x, packed = drawn(128, COLUMNS), [pack(weight, bits=bits) for weight in weights]

    def reference(index):
        with use_backend("reference"):
            return linear(x, packed[index])

    ratio = least_ratio(benchmark, lambda i: linear(x, packed[i]), reference, 1.0)
    assert ratio <= 1.0


@needs_cpu_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_one_token_on_quantised_weights_is_faster_than_on_fp32(benchmark, weights, bits) -> None:
    x, packed = drawn(1, COLUMNS), [pack(weight, bits=bits) for weight in weights]
    ratio = least_ratio(benchmark, lambda i: linear(x, packed[i]), lambda i: functional.linear(x, weights[i]), 1.0)
    assert ratio <= 1.0
