"""saap.collect in loops that are not ours."""

import pytest
import torch
from torch.nn import functional as F

import saap
from saap.units import discover
from tests.saap.test_calibrate import assert_same, measure, token_ids
from tests.saap.tiny import tiny_model

ROUNDING = 1e-6  # transformers' norms round to fp32, and a loss of another scale rounds otherwise


def loss_of(model, ids) -> torch.Tensor:
    """The mean over sequences of their mean next-token loss, through the model's own full logits."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_a_loop_of_ones_own_gives_what_calibration_gives(checkpoint_layers: bool) -> None:
    model, ids = tiny_model("llama").train(), token_ids(6)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    with saap.collect(model, loss_scale=1 / 3, checkpoint_layers=checkpoint_layers) as collected:
        for part in ids.split(3):
            loss_of(model, part).backward()
    assert model.training and weight.requires_grad and torch.equal(weight.grad, torch.ones_like(weight))
    assert_same(collected.statistics, measure(tiny_model("llama"), [ids]), rtol=ROUNDING)


def test_labels_of_the_model_and_padding_work() -> None:
    model, ids = tiny_model("opt"), token_ids(2)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    predicted = torch.tensor([11.0, 6.0], dtype=torch.float64)
    with saap.collect(model) as collected:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].transpose(1, 2)
        losses = F.cross_entropy(logits, labels[:, 1:], reduction="none").sum(1) / predicted
        losses.sum().backward()
    assert_same(collected.statistics, measure(tiny_model("opt"), [(ids, mask)]), rtol=ROUNDING)
    with saap.collect(model, loss_scale=1 / 2) as collected:
        model(input_ids=ids, labels=ids).loss.backward()
    assert_same(collected.statistics, measure(tiny_model("opt"), [ids]), rtol=1e-5)  # the loss is fp32 there


@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_several_forwards_may_share_one_backward(checkpoint_layers: bool) -> None:
    model, ids = tiny_model("llama"), token_ids(6)
    with saap.collect(model, loss_scale=1 / 3, checkpoint_layers=checkpoint_layers) as collected:
        with torch.no_grad():
            loss_of(model, ids)  # evaluation in between counts nothing
        (loss_of(model, ids[:3]) + loss_of(model, ids[3:])).backward()
    assert_same(collected.statistics, measure(tiny_model("llama"), [ids]), rtol=ROUNDING)


def test_spans_cut_a_packed_row_into_sequences() -> None:
    model, ids = tiny_model("llama"), token_ids(1)
    spans = torch.tensor([[0, 5], [5, 12]], dtype=torch.int32)
    with saap.collect(model, spans) as collected:
        loss_of(model, ids).backward()
    assert collected.statistics.sequences == 2 and collected.statistics.tokens == 12
    whole = measure(tiny_model("llama"), [ids])
    for name in ("attention", "mlp"):  # signed sums add up over the two parts of one sequence
        summed, want = collected.statistics.modules[name].signed * 2, whole.modules[name].signed
        torch.testing.assert_close(summed, want, rtol=ROUNDING, atol=float(ROUNDING * want.abs().max()))


def test_misuse_is_named_and_the_model_left_as_found() -> None:
    model, ids = tiny_model("llama").train(), token_ids(2)
    with pytest.raises(RuntimeError, match="expected a backward pass inside collect"), saap.collect(model):
        loss_of(model, ids)
    with pytest.raises(RuntimeError, match="one backward per forward"), saap.collect(model):
        loss = loss_of(model, ids)
        loss.backward(retain_graph=True)
        loss.backward()
    outside = torch.tensor([[0, 30]], dtype=torch.int32)
    with pytest.raises(ValueError, match="expected ranges within 24 rows"), saap.collect(model, outside):
        loss_of(model, ids)
    with pytest.raises(RuntimeError, match="layer 1: no gradient reached"), saap.collect(model):
        hidden = []
        handle = model.model.layers[2].register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
        loss = loss_of(model, ids)
        handle.remove()
        torch.autograd.grad(loss, hidden[0])
    with pytest.raises(ValueError, match=r"NaN or inf in layer 2, mlp \(down\), sequence 1"), saap.collect(model):
        logits = model(input_ids=ids).logits
        logits.backward(torch.ones_like(logits) * torch.tensor([1.0, float("nan")]).view(2, 1, 1))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not [m for m in model.modules() if "forward" in m.__dict__]
    assert discover(model)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_coupled_salience_takes_the_mean_over_sequences_first(family: str, tmp_path) -> None:
    from saap.families import family_of, layers_of, projections_of
    from tests.saap.oracle import sequence_loss

    model, ids = tiny_model(family), token_ids(3)
    statistics = saap.calibrate(model, data=ids, samples=3, seq_len=12, coupled=True)
    layer = projections_of(layers_of(model, family_of(model))[1], family_of(model))
    for part, axis, size in (("up", 1, 1), ("down", 0, 1), ("q", 1, statistics.units.layers[1].rows_per_unit("q"))):
        (linear, rows), saliences, of_bias = (layer[part].linear, layer[part].rows), [], []
        for sequence in ids:
            model.zero_grad()
            sequence_loss(model, sequence).backward()
            saliences.append((linear.weight * linear.weight.grad).detach()[rows])
            of_bias.append((linear.bias * linear.bias.grad).detach() if linear.bias is not None and axis else None)
        mean, square = sum(saliences) / 3, sum(s.square() for s in saliences) / 3
        lines = (mean - square / 2).abs().sum(axis)
        if of_bias[0] is not None:
            lines = lines + (sum(of_bias) / 3 - sum(b.square() for b in of_bias) / 6).abs()
        module = statistics.modules["attention" if part == "q" else "mlp"]
        start, stop = statistics.units.offsets("attention" if part == "q" else "mlp")[1:3]
        found = module.coupled[2, module.matrices.index(part), start:stop]
        torch.testing.assert_close(found, lines.view(-1, size).sum(1), rtol=1e-8, atol=1e-14)
    model.zero_grad()
    statistics.save(tmp_path / "s.safetensors")
    loaded = saap.Statistics.load(tmp_path / "s.safetensors")
    scores = saap.score(loaded, "element", order="mixed", coupled=True)
    torch.testing.assert_close(scores.mlp, statistics.modules["mlp"].coupled[2].sum(0))


def test_coupled_statistics_of_more_than_one_pass_are_refused() -> None:
    model, ids = tiny_model("llama"), token_ids(4)
    with pytest.raises(RuntimeError, match="one forward and backward pass only"), saap.collect(model, coupled=True):
        for part in ids.split(2):
            loss_of(model, part).backward()
    with pytest.raises(ValueError, match="need all 4 samples in one micro-batch of one process; got batch_size 2"):
        saap.calibrate(model, data=ids, samples=4, seq_len=12, batch_size=2, coupled=True)
    first, second = (saap.calibrate(model, data=part, samples=2, seq_len=12, coupled=True) for part in ids.split(2))
    with pytest.raises(ValueError, match="cannot be merged"):
        first.merge(second)
    plain = saap.calibrate(model, data=ids, samples=4, seq_len=12)
    with pytest.raises(ValueError, match="collect them with coupled=True"):
        saap.score(plain, "element", coupled=True)
