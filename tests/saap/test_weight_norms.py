"""Norms of weights: by panels on a CPU, in whole reductions on a device."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from saap import weight_norms
from saap.weight_norms import line_norms


def exact(linear: nn.Linear, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    weight, along = linear.weight.detach().double(), 0 if part == "down" else 1
    l1, square = weight.abs().sum(along), weight.square().sum(along)
    if part != "down" and linear.bias is not None:
        bias = linear.bias.detach().double()
        l1, square = l1 + bias.abs(), square + bias.square()
    return l1, square


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_both_ways_agree_with_float64(monkeypatch, dtype: torch.dtype, whole: bool) -> None:
    if whole:
        monkeypatch.setattr(weight_norms, "_in_panels", weight_norms._whole)
    torch.manual_seed(0)
    linears = {"up": nn.Linear(300, 700, dtype=dtype), "down": nn.Linear(700, 300, bias=False, dtype=dtype)}
    # positive terms, hundreds of them, added in fp32, or float64 weights in float64 (the root costs a rounding)
    rtol = 1e-13 if dtype == torch.float64 else 1e-5
    for part, norms in line_norms(linears.items()).items():
        for got, want in zip(norms, exact(linears[part], part), strict=True):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want, rtol=rtol, atol=0)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.results: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.results += [result] if isinstance(result, torch.Tensor) else []
        return result


@pytest.mark.parametrize("part", ["up", "down"])
def test_a_device_runs_few_operations_and_makes_no_copy_of_the_weight(monkeypatch, part: str) -> None:
    monkeypatch.setattr(weight_norms, "_in_panels", weight_norms._whole)
    linear = nn.Linear(64, 2000, dtype=torch.bfloat16)
    with Operations() as seen:
        line_norms([(part, linear)])
    assert len(seen.results) <= 16  # panels take 6 each
    own = linear.weight.untyped_storage().data_ptr()
    copies = [t for t in seen.results if t.numel() >= linear.weight.numel() and t.untyped_storage().data_ptr() != own]
    assert not copies
