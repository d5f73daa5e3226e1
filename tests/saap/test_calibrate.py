"""Calibration against brute-force autograd, and everything that must not change its result."""

import sys

import pytest
import torch

from saap.calibrate import calibrate, collect_batch
from saap.collector import Collector
from saap.families import family_of, layers_of, linears_of
from saap.loss import backward_sequence_losses
from saap.moments import Moments
from saap.statistics import ORDERS, Statistics
from saap.units import MODULES, discover, unit_masks
from tests.saap.oracle import salience_per_sequence, sequence_loss
from tests.saap.tiny import FAMILIES, tiny_model

# float64 end to end except the fp32 weights' statistics contract: rounding only
TIGHT = {"rtol": 1e-8, "atol": 1e-14}


def token_ids(sequences: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (sequences, length), generator=torch.Generator().manual_seed(seed))


def measure(model, batches, **options) -> Statistics:
    with Collector(model, discover(model), **options) as collector:
        for batch in batches:
            collect_batch(collector, *batch) if isinstance(batch, tuple) else collect_batch(collector, batch)
    return collector.statistics


def assert_same(left: Statistics, right: Statistics, rtol: float = 1e-9) -> None:
    assert left.sequences == right.sequences and left.tokens == right.tokens
    torch.testing.assert_close(left.influence, right.influence, rtol=rtol, atol=0)
    torch.testing.assert_close(left.experts, right.experts, rtol=rtol, atol=0)
    for name in MODULES:
        for key, tensor in left.modules[name].tensors().items():
            other = right.modules[name].tensors()[key]
            scale = tensor.abs().amax()  # sums of signed terms cancel: compare with the largest of their kind
            torch.testing.assert_close(tensor, other, rtol=rtol, atol=float(rtol * scale), msg=f"{name}.{key}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_salience_equals_brute_force_autograd(family: str) -> None:
    model = tiny_model(family)
    units = discover(model)
    ids = token_ids()
    got = measure(model, [ids])
    expected = salience_per_sequence(model, units, list(ids))
    for (layer, name, part), sums in expected.items():
        module, offsets = got.modules[name], units.offsets(name)
        row, where = module.rows.index(part), slice(offsets[layer], offsets[layer + 1])
        a = sums["signed"]
        vector = torch.stack([sums[f"vector {order}"] for order in ORDERS], 1)  # [S, 3, U]
        element = torch.stack([sums[order] for order in ORDERS], 1)
        torch.testing.assert_close(module.signed[row, where], a.mean(0), **TIGHT)
        want = Moments.of(vector, element).tensors()
        for field, tensor in module.salience.tensors().items():
            torch.testing.assert_close(tensor[..., row, where], want[field], **TIGHT)
        covariance = torch.einsum("sau,sbu->abu", vector - vector.mean(0), element - element.mean(0))
        torch.testing.assert_close(module.salience.cross[..., row, where], covariance, **TIGHT)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_aggregate_rows_are_the_joint_and_the_summed_importance(family: str) -> None:
    model = tiny_model(family)
    units, ids = discover(model), token_ids()
    got = measure(model, [ids])
    expected = salience_per_sequence(model, units, list(ids))
    for name in MODULES:
        module = got.modules[name]
        parts = [expected[1, name, part] for part in module.matrices]
        start, stop = units.offsets(name)[1:3]
        joint = sum(p["signed"] for p in parts)
        summed, mask = sum(p["vector second"] for p in parts), parts[-1]["signed"]
        total, last = sum(p["second"] for p in parts), parts[-1]["second"]
        rows = {"joint": (joint.square(), total), "sum": (summed, total), "mask": (mask.square(), last)}
        for row, (want, element) in rows.items():
            index = module.rows.index(row)
            torch.testing.assert_close(module.salience.vector_mean[1, index, start:stop], want.mean(0), **TIGHT)
            torch.testing.assert_close(module.salience.vector_m2[1, index, start:stop], want.var(0) * 3, **TIGHT)
            torch.testing.assert_close(module.salience.element_mean[1, index, start:stop], element.mean(0), **TIGHT)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_an_independent_mask_is_the_last_matrix_salience(family: str) -> None:
    model = tiny_model(family)
    units, ids = discover(model), token_ids()
    got = measure(model, [ids])
    expected = {name: torch.zeros(units.count(name), dtype=torch.float64) for name in MODULES}
    for sequence in ids:
        with unit_masks(model, units) as masks:
            sequence_loss(model, sequence).backward()
            for name in MODULES:
                expected[name] += torch.cat([mask.grad for mask in masks[name]]) / len(ids)
    for name in MODULES:
        torch.testing.assert_close(got.modules[name].signed[-1], expected[name], **TIGHT)


def test_coupled_matrices_have_equal_signed_salience() -> None:
    got = measure(tiny_model("llama"), [token_ids()])
    attention, mlp = got.modules["attention"], got.modules["mlp"]
    q, k, v, o = attention.signed
    torch.testing.assert_close(v, o, **TIGHT)
    torch.testing.assert_close(q, k, **TIGHT)
    _, up, down = mlp.signed
    torch.testing.assert_close(up, down, **TIGHT)


def test_chunking_order_padding_checkpointing_and_merging_change_nothing() -> None:
    model, ids = tiny_model("llama"), token_ids(6)
    whole = measure(model, [ids])
    assert_same(measure(model, ids.split(1)), whole)
    assert_same(measure(model, [ids[3:], ids[:3]]), whole)
    assert_same(measure(model, [ids], checkpoint_layers=True), whole)
    padded = torch.cat([torch.full((6, 3), 7), ids, torch.full((6, 2), 9)], 1)
    mask = torch.zeros_like(padded)
    mask[:, 3:-2] = 1
    right = torch.cat([ids, torch.full((6, 4), 9)], 1), torch.cat([torch.ones_like(ids), torch.zeros(6, 4).long()], 1)
    assert_same(measure(model, [right]), whole)
    shifted = measure(model, [(padded, mask)])  # rotary positions are relative, up to transformers' fp32 sines
    assert_same(shifted, whole, rtol=1e-5)
    first, second = measure(model, [ids[:2]]), measure(model, [ids[2:]])
    first.data, second.data = ("a",), ("b",)
    assert_same(first.merge(second), whole)
    assert_same(second.merge(first), whole)


def test_ragged_sequences_equal_separate_ones() -> None:
    model, ids = tiny_model("opt"), token_ids(2)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    separate = measure(model, [ids[:1], ids[1:, :7]])
    assert_same(measure(model, [(ids, mask)]), separate)


@pytest.mark.parametrize("scale", [8.0, 1024.0])
def test_loss_scale_changes_nothing(scale: float) -> None:
    model, ids = tiny_model("qwen2"), token_ids()
    assert_same(measure(model, [ids], loss_scale=scale), measure(model, [ids]))


def test_input_statistics_are_those_of_the_inputs_of_o_and_down() -> None:
    model, ids = tiny_model("llama"), token_ids()
    family = family_of(model)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = [
        linears_of(layer, family)[part].register_forward_pre_hook(
            lambda _m, args, key=(index, part): seen.__setitem__(key, args[0].flatten(0, -2))
        )
        for index, layer in enumerate(layers_of(model, family))
        for part in ("o", "down")
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    got = measure(model, ids.split(2))
    for name, part in (("attention", "o"), ("mlp", "down")):
        inputs = torch.cat([seen[index, part] for index in range(3)], -1)
        module = got.modules[name]
        torch.testing.assert_close(module.input_mean, inputs.mean(0), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(module.input_m2, inputs.var(0) * (len(inputs) - 1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(module.input_absmax, inputs.abs().amax(0), rtol=1e-6, atol=1e-9)
        per_sequence = inputs.view(*ids.shape, -1).abs().mean(1)
        torch.testing.assert_close(module.input_activity, per_sequence.square().mean(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_block_influence_is_the_mean_over_tokens_of_one_minus_the_cosine(family: str) -> None:
    model, ids = tiny_model(family), token_ids(4)
    with torch.no_grad():
        states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    got = measure(model, [ids[:3], ids[3:]]).influence
    for layer in range(2):  # the last entry of hidden_states is normed
        cosine = torch.nn.functional.cosine_similarity(states[layer], states[layer + 1], dim=-1)
        torch.testing.assert_close(got[layer], 1 - cosine.mean(), rtol=1e-9, atol=0)
    assert got[2] > 0


def test_weight_norms_cover_biases() -> None:
    model = tiny_model("opt")
    units = discover(model)
    got = measure(model, [token_ids(1)]).modules["mlp"]
    layer = layers_of(model, family_of(model))[1]
    start, stop = units.offsets("mlp")[1:3]
    up = torch.cat([layer.fc1.weight, layer.fc1.bias[:, None]], 1)
    torch.testing.assert_close(got.weight_l1[0, start:stop], up.abs().sum(1).detach())
    torch.testing.assert_close(got.weight_square[1, start:stop], layer.fc2.weight.square().sum(0).detach())


def test_column_norms_are_those_of_o_and_down() -> None:
    model = tiny_model("llama")
    got = measure(model, [token_ids(1)]).modules
    for name, path in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        weight = torch.cat([layer.get_submodule(path).weight.detach() for layer in model.model.layers], 1)
        torch.testing.assert_close(got[name].column_l1, weight.abs().sum(0))
        torch.testing.assert_close(got[name].column_square, weight.square().sum(0))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_weight_sized_tensor_is_saved_and_no_gradient_is_left(checkpointing: bool) -> None:
    model, ids = tiny_model("llama"), token_ids(1, 4)
    shapes: list[torch.Size] = []
    weights = {p.shape for p in model.parameters() if p.ndim == 2} | {
        p.shape[::-1] for p in model.parameters() if p.ndim == 2
    }

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        measure(model, [ids], checkpoint_layers=checkpointing)
    assert shapes and not weights & set(shapes)
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_left_as_found_even_after_an_exception() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(KeyError, match="planted"), Collector(model, discover(model), checkpoint_layers=True):
        raise KeyError("planted")
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    assert not frozen.requires_grad and model.model.layers[0].mlp.down_proj.weight.requires_grad
    assert not [m for m in model.modules() if "forward" in m.__dict__]


def test_calibrate_twice_is_bitwise_equal_and_reports_progress(tmp_path) -> None:
    model, ids = tiny_model("llama", dtype=torch.float32), token_ids(6)
    seen: list[tuple[int, int]] = []
    options = {"data": ids, "samples": 6, "seq_len": 12, "batch_size": 4}
    first = calibrate(model, **options, progress=lambda done, total: seen.append((done, total)))
    second = calibrate(model, **options)
    assert seen == [(4, 6), (6, 6)]
    first.save(tmp_path / "a.safetensors")
    second.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_same(Statistics.load(tmp_path / "a.safetensors"), first)


def test_running_out_of_memory_halves_the_micro_batch_and_loses_nothing(monkeypatch) -> None:
    model, ids = tiny_model("llama"), token_ids(7)
    options = {"data": ids, "samples": 7, "seq_len": 12}
    whole = calibrate(model, **options, batch_size=8)
    real, sizes = backward_sequence_losses, []

    def small_device(model, input_ids, *rest):
        sizes.append(len(input_ids))
        losses = real(model, input_ids, *rest)  # memory runs out after some layers have reported
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("planted")
        return losses

    module = sys.modules["saap.calibrate"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "backward_sequence_losses", small_device)
    with pytest.warns(UserWarning, match="micro-batches of 2 sequences"):
        assert_same(calibrate(model, **options, batch_size=8), whole)
    assert sizes == [7, 4, 2, 2, 2, 1]

    def no_memory(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(module, "backward_sequence_losses", no_memory)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        calibrate(model, **options, batch_size=8)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_agree_in_fp32(backend: str, family: str) -> None:
    ids = token_ids(4, 16)
    exact = measure(tiny_model(family), [ids])
    got = measure(tiny_model(family, dtype=torch.float32), [ids], backend=backend)
    for name in MODULES:
        want = exact.modules[name].salience
        for field in ("vector_mean", "element_mean"):
            expected, found = want.tensors()[field], got.modules[name].salience.tensors()[field]
            scale = expected.abs().amax(-1, keepdim=True)
            # fp32 forward and backward over 3 layers: about 1e-5 relative to the largest unit
            assert ((found - expected).abs() <= 1e-4 * scale).all()
