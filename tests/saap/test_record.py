"""A Linear that reports its operands, under autocast too: statistics are of the product that was computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saap
from saap.families import family_of, layers_of, linears_of
from saap.record import RecordedLinear, operands
from tests.saap.test_calibrate import token_ids
from tests.saap.tiny import tiny_model

BF16 = torch.bfloat16


def autocast(dtype: torch.dtype | None):
    return torch.autocast("cpu", dtype or BF16, enabled=dtype is not None)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("keep_output", [False, True])
@pytest.mark.parametrize("cast", [None, BF16], ids=str)
def test_what_is_reported_is_what_the_product_took_and_gave(cast, keep_output: bool, inside: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 16).requires_grad_(False), torch.randn(2, 5, 24, requires_grad=True)
    gradient, reported = torch.randn(2, 5, 16), []
    with autocast(cast):
        wanted = linear(x)
        y = RecordedLinear.apply(x, linear, lambda *rows: reported.append(rows), keep_output)
    assert torch.equal(y, wanted) and y.dtype == (cast or torch.float32)
    with autocast(cast if inside else None):
        (dx,) = torch.autograd.grad(y, x, gradient.to(y.dtype))
    (want_dx,) = torch.autograd.grad(wanted, x, gradient.to(y.dtype))
    assert torch.equal(dx, want_dx) and dx.dtype == torch.float32
    ((rows, out, d_rows, d_out),) = reported
    weight, bias = operands(linear, y.dtype)
    assert torch.equal(F.linear(rows, weight, bias), y.flatten(0, 1))
    assert (out is None) != keep_output and (out is None or torch.equal(out, y.flatten(0, 1)))
    assert torch.equal(d_out, gradient.to(y.dtype).flatten(0, 1)) and torch.equal(d_out @ weight, d_rows)
    if cast is None:
        assert weight is linear.weight and bias is linear.bias


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_statistics_under_autocast_are_those_of_the_mixed_model(family: str, inside: bool) -> None:
    ids = token_ids(3)
    model = tiny_model(family, torch.float32)
    with saap.collect(model) as collected:
        with autocast(BF16):
            logits = model(input_ids=ids).logits[:, :-1]
        losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        with autocast(BF16 if inside else None):
            losses.sum().backward()
    linears = linears_of(layers_of(model, family_of(model))[1], family_of(model))
    for part, axis in (("up", 1), ("down", 0), ("q", 1)):
        linear, size = linears[part], collected.statistics.units.layers[1].rows_per_unit(part)
        element, signed = [], []
        for sequence in ids:
            model.zero_grad()
            with autocast(BF16):
                logits = model(input_ids=sequence[None]).logits[0, :-1]
            F.cross_entropy(logits.float(), sequence[1:]).backward()
            s = (linear.weight * linear.weight.grad).detach()
            b = (linear.bias * linear.bias.grad).detach() if linear.bias is not None and axis else torch.zeros(1)
            element.append((s.abs().sum(axis) + b.abs()).view(-1, size).sum(1))
            signed.append((s.sum(axis) + b).view(-1, size).sum(1))
        name = "attention" if part == "q" else "mlp"
        module = collected.statistics.modules[name]
        start, stop = collected.statistics.units.offsets(name)[1:3]
        row = module.matrices.index(part)
        found = module.salience.element_mean[0, row, start:stop].float()
        want = torch.stack(element).mean(0)
        # weight.grad is rounded to bf16, our sums are not: 6e-4 of the largest unit measured
        assert ((found - want).abs() <= 2e-3 * want.max()).all()
        found, want = module.signed[row, start:stop].float(), torch.stack(signed).mean(0)
        assert ((found - want).abs() <= 2e-3 * torch.stack(element).mean(0).max()).all()
