"""Results come from a device in few transfers. There is none here: the CPU is taken for a device instead."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from saap import host, record, weight_norms
from saap.calibrate import collect_batch
from saap.collector import Collector
from saap.families import family_of
from saap.host import on_host
from saap.refuse import refuse_nonfinite_weights
from saap.units import discover
from tests.saap.test_calibrate import assert_same, measure, token_ids
from tests.saap.tiny import tiny_model

LAYERS = 3


@pytest.fixture
def transfers(monkeypatch) -> list[torch.Tensor]:
    """What was moved, by transfer, with the CPU in the place of a device."""
    moved: list[torch.Tensor] = []
    elsewhere = torch.device("meta")
    monkeypatch.setattr(host, "CPU", elsewhere)
    monkeypatch.setattr(record, "CPU", elsewhere)
    monkeypatch.setattr(weight_norms, "_in_panels", weight_norms._whole)
    monkeypatch.setattr(host, "_transfer", lambda packed: moved.append(packed) or packed.clone())
    return moved


class Reads(TorchFunctionMode):
    """Calls by which floating-point results leave a device, other than ``on_host``."""

    NAMES = {"cpu", "item", "tolist", "numpy", "nonzero"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES and args[0].is_floating_point():  # spans and masks are made on the CPU
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_tensors_of_a_device_come_over_together_as_float64(transfers) -> None:
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor([True, False]), torch.tensor(2.5, dtype=torch.bfloat16)]
    found = on_host(tensors)
    assert len(transfers) == 1 and transfers[0].shape == (9,)
    for got, tensor in zip(found, tensors, strict=True):
        assert got.dtype == torch.float64 and torch.equal(got, tensor.double())
    assert on_host([]) == [] and len(transfers) == 1


def test_tensors_on_the_cpu_are_not_copied() -> None:
    tensor = torch.ones(3, dtype=torch.float64)
    assert on_host([tensor])[0] is tensor


@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_a_micro_batch_waits_for_the_device_once_per_layer_and_once_for_its_flags(
    transfers, checkpoint_layers: bool
) -> None:
    model, ids = tiny_model("llama"), token_ids(4)
    with Collector(model, discover(model), checkpoint_layers=checkpoint_layers) as collector:
        assert len(transfers) == LAYERS  # norms of the weights
        transfers.clear()
        with Reads() as reads:
            collect_batch(collector, ids)
        assert len(transfers) == 1 + LAYERS
    assert not reads.seen


def test_what_comes_from_a_device_is_what_the_cpu_computes(transfers, monkeypatch) -> None:
    model, ids = tiny_model("llama"), token_ids(6)
    monkeypatch.setattr(record, "MOMENT_BYTES", 1000)  # several pieces
    there = measure(model, [ids[:4], ids[4:]])
    assert transfers
    monkeypatch.undo()
    assert_same(there, measure(tiny_model("llama"), [ids[:4], ids[4:]]), rtol=1e-12)


def test_weights_are_checked_by_one_read_per_layer(transfers) -> None:
    model = tiny_model("llama")
    refuse_nonfinite_weights(model, family_of(model))
    assert len(transfers) == LAYERS + 1  # and one for the embeddings and the head
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[2, 3] = float("inf")
    with pytest.raises(ValueError, match="found NaN or inf in model.layers.1.mlp.down_proj.weight"):
        refuse_nonfinite_weights(model, family_of(model))
