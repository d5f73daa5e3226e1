"""Compensation against plain least squares on materialised inputs, and everything that must not change it."""

import gc
import sys

import pytest
import torch
from torch import Tensor

import saap
from saap.families import family_of, layers_of, linears_of
from saap.plan import LayerPlan, Plan
from saap.units import IN_PARTS
from tests.saap.test_calibrate import FAMILIES
from tests.saap.test_checkpoint import make_plan
from tests.saap.test_stream import state_of
from tests.saap.tiny import MIXTURES, tiny_model

DATA = torch.randint(0, 64, (9, 24), generator=torch.Generator().manual_seed(3))
OPTIONS = {"data": DATA, "samples": 9, "seq_len": 24, "batch_size": 2}  # the last micro-batch is smaller
DAMPING = 1e-3
PLAIN = {"attention_bias": False, "mlp_bias": False}  # a Llama as they are: without biases


def parts_of(model) -> dict[tuple[int, str], torch.nn.Linear]:
    family = family_of(model)
    return {
        (index, part): linear
        for index, layer in enumerate(layers_of(model, family))
        for part, linear in linears_of(layer, family).items()
        if part in IN_PARTS
    }


@torch.no_grad()
def operands(model, ids: Tensor = DATA) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Inputs (T, F) and outputs (T, D) of every o and down in one forward pass of the whole model."""
    seen, handles = {}, []
    for key, linear in parts_of(model).items():
        hook = lambda _m, args, out, key=key: seen.__setitem__(key, (args[0].flatten(0, -2), out.flatten(0, -2)))  # noqa: E731
        handles.append(linear.register_forward_hook(hook))
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def ridge(x: Tensor, y: Tensor, old: Tensor, affine: bool, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Weight (D, K) and bias (D,) by QR of the stacked system: min ||y - x W' - b||^2 + damping m ||W - old||^2."""
    rest = y - x @ old.T
    mean_x, mean_y = (x.mean(0), rest.mean(0)) if affine else (x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1]))
    centred = x - mean_x
    root = (damping * centred.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    stacked = torch.linalg.lstsq(
        torch.cat([centred, root]), torch.cat([rest - mean_y, y.new_zeros(x.shape[1], y.shape[1])])
    )
    change = stacked.solution.T
    return old + change, mean_y - change @ mean_x


def assert_close(got: Tensor, wanted: Tensor) -> None:
    # float64; the normal equations square a condition number of about 1e3 (damping 1e-3)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def kept_of(plan: Plan, index: int, part: str) -> Tensor:
    return plan.layers[index].features(part, plan.units.layers[index])


@pytest.mark.parametrize("family", [*FAMILIES, "plain llama"])
def test_dense_inputs_give_the_ridge_solution(family: str) -> None:
    model = tiny_model("llama", **PLAIN) if family == "plain llama" else tiny_model(family)
    plan = make_plan(model)
    if family in MIXTURES:  # whose experts have tests of their own
        plan = Plan(plan.units, tuple(LayerPlan(layer.kv_heads, tuple(range(96))) for layer in plan.layers))
    found = saap.compensation(model, plan, **OPTIONS, inputs="dense", damping=DAMPING)
    for (index, part), (x, y) in operands(model).items():
        linear, kept = parts_of(model)[index, part], kept_of(plan, index, part)
        if len(kept) == linear.in_features:
            assert part not in found.layers[index]
            continue
        affine = linear.bias is not None
        own = y - linear.bias if affine else y
        weight, bias = ridge(x[:, kept], own, linear.weight[:, kept], affine)
        new = found.layers[index][part]
        assert_close(new.weight, weight)
        assert (new.bias is not None) is affine
        if affine:
            assert_close(new.bias, bias + linear.bias)


@pytest.mark.parametrize("family", ["plain llama", "opt"])
def test_bias_is_the_mean_of_what_the_removed_columns_gave(family: str) -> None:
    model = tiny_model("llama", **PLAIN) if family == "plain llama" else tiny_model(family)
    plan = make_plan(model)
    found = saap.compensation(model, plan, **OPTIONS, method="bias")
    for (index, part), (x, _) in operands(model).items():
        linear, gone = parts_of(model)[index, part], torch.ones(parts_of(model)[index, part].in_features).bool()
        gone[kept_of(plan, index, part)] = False
        if gone.any():
            old = 0 if linear.bias is None else linear.bias
            new = found.layers[index][part]
            assert new.weight is None
            assert_close(new.bias, old + linear.weight[:, gone] @ x[:, gone].mean(0))


def redundant(model) -> Plan:
    """A plan that removes one KV group and ten channels per layer, each made a multiple of one that stays."""
    with torch.no_grad():
        for layer in layers_of(model, family_of(model)):
            for name, scale in (("q_proj", 1.0), ("k_proj", 1.0), ("v_proj", -2.0)):
                linear = getattr(layer.self_attn, name)
                size = linear.weight.shape[0] // 4
                linear.weight[-size:] = scale * linear.weight[:size]
            for linear, scale in ((layer.mlp.gate_proj, 1.0), (layer.mlp.up_proj, 3.0)):
                linear.weight[-10:] = scale * linear.weight[:10]
    units = saap.discover(model)
    return Plan(units, tuple(LayerPlan((0, 1, 2), tuple(range(87))) for _ in units.layers))


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_what_is_a_combination_of_what_stays_is_not_missed(inputs: str) -> None:
    model = tiny_model("llama", **PLAIN)
    plan = redundant(model)
    found = saap.compensation(model, plan, **OPTIONS, inputs=inputs, damping=1e-13)
    with torch.no_grad():
        dense = model(DATA).logits
        assert (saap.compact(model, plan, copy=True)(DATA).logits - dense).abs().max() > 0.1
        pruned = saap.compact(model, plan, found)(DATA).logits
    torch.testing.assert_close(pruned, dense, rtol=0, atol=1e-8)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_streaming_and_micro_batches_change_nothing(method: str, inputs: str, tmp_path) -> None:
    model = tiny_model("qwen2", torch.float32)
    plan, options = make_plan(model), {"method": method, "inputs": inputs}
    resident = saap.compensation(model, plan, **OPTIONS, **options, stream=False)
    streamed = saap.compensation(model, plan, **OPTIONS, **options, stream=saap.Streaming(folder=tmp_path))
    assert not list(tmp_path.iterdir())
    whole = saap.compensation(model, plan, **OPTIONS | {"batch_size": 9}, **options)
    for one, two, three in zip(resident.layers, streamed.layers, whole.layers, strict=True):
        assert one.keys() == two.keys()
        for part, new in one.items():
            for name in ("weight", "bias"):
                tensor = getattr(new, name)
                if tensor is not None:
                    assert torch.equal(tensor, getattr(two[part], name))
                    # fp32 forward passes and products of other sizes round otherwise
                    torch.testing.assert_close(tensor, getattr(three[part], name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_the_model_is_left_as_found_and_blocks_may_come_in_another_dtype(inputs: str) -> None:
    model = tiny_model("llama", torch.float32, **PLAIN).train()
    model.model.layers[1].eval()
    plan, before = make_plan(model), state_of(model)
    modes = [module.training for module in model.modules()]
    streamed = saap.compensation(model, plan, **OPTIONS, inputs=inputs, stream=saap.Streaming(dtype=torch.float64))
    assert state_of(model) == before and modes == [module.training for module in model.modules()]
    assert not [m for m in model.modules() if "forward" in m.__dict__ or m._forward_hooks]
    model.double()
    model.model.rotary_emb.float()  # as in a model loaded in float64: buffers keep their dtype
    wanted = saap.compensation(model, plan, **OPTIONS, inputs=inputs)
    for found, exact in zip(streamed.layers, wanted.layers, strict=True):
        for part, new in found.items():
            assert new.weight.dtype == torch.float32
            torch.testing.assert_close(
                new.weight, exact[part].weight.float(), rtol=1e-6, atol=1e-6
            )  # fp32 weights go on


def test_a_failure_leaves_the_model_as_found(monkeypatch) -> None:
    model = tiny_model("llama", torch.float32, **PLAIN).train()
    plan, before = make_plan(model), state_of(model)

    def stop(done: int, _total: int) -> None:
        if done > 30:  # in the second block, whose o has been replaced by then
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saap.compensation(model, plan, **OPTIONS, inputs="pruned", progress=stop)
    assert state_of(model) == before and model.training
    assert not [m for m in model.modules() if "forward" in m.__dict__ or m._forward_hooks]


def test_running_out_of_memory_halves_the_micro_batch_and_counts_nothing_twice(monkeypatch) -> None:
    model = tiny_model("llama", **PLAIN)
    plan = make_plan(model)
    module = sys.modules["saap.thinned_linear"]
    real = module.NormalEquations.of

    def small_device(inputs: Tensor, residual: Tensor):
        if len(inputs) > 48 and inputs.shape[1] == 45:  # of the first block's down, after its o has been multiplied
            raise torch.OutOfMemoryError("planted")
        return real(inputs, residual)

    for inputs in ("dense", "pruned"):
        wanted = saap.compensation(model, plan, **OPTIONS, inputs=inputs)
        with monkeypatch.context() as patched:
            patched.setattr(module.NormalEquations, "of", small_device)
            with pytest.warns(UserWarning, match="micro-batches of 2 sequences"):
                found = saap.compensation(model, plan, **OPTIONS | {"batch_size": 4}, inputs=inputs)
        for one, two in zip(found.layers, wanted.layers, strict=True):
            for part, new in one.items():
                assert_close(new.weight, two[part].weight)


def test_progress_counts_every_pass() -> None:
    model = tiny_model("llama", torch.float32)
    for inputs, total in (("dense", 27), ("pruned", 81)):
        seen: list[tuple[int, int]] = []
        saap.compensation(
            model, make_plan(model), **OPTIONS, inputs=inputs, progress=lambda *pair, seen=seen: seen.append(pair)
        )
        assert seen[0] == (2, total) and seen[-1] == (total, total)


def test_compact_applies_what_belongs_to_the_plan_and_nothing_else() -> None:
    model = tiny_model("llama", **PLAIN)
    plan = make_plan(model)
    found = saap.compensation(model, plan, **OPTIONS)
    before = model(DATA).logits
    with pytest.raises(ValueError, match="computed for another plan: layer 0 keeps other units"):
        saap.compact(model, make_plan(model, "uniform"), found)
    other = tiny_model("llama", seed=1, **PLAIN)
    with pytest.raises(ValueError, match="this compensation belongs to a model with fingerprint"):
        saap.compact(other, make_plan(other), found)
    assert torch.equal(model(DATA).logits, before)
    pruned = saap.compact(model, plan, found, copy=True)
    for (index, part), linear in parts_of(pruned).items():
        if part in found.layers[index]:
            assert torch.equal(linear.weight, found.layers[index][part].weight) and linear.weight.requires_grad
    assert pruned.saap_plan.settings["compensate"] == "least_squares" and pruned.saap_plan.layers == plan.layers
    # a check of the purpose: on the text it was computed on, the logits are nearer the dense model's
    plain = saap.compact(model, plan, copy=True)
    assert (pruned(DATA).logits - before).square().mean() < 0.9 * (plain(DATA).logits - before).square().mean()


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_only_one_block_is_on_the_device_at_a_time(monkeypatch, inputs: str) -> None:
    """A dtype stands in for a device; sums are over one block's Linears, freed before the next block comes."""
    model = tiny_model("llama", torch.float32, **PLAIN)
    plan, blocks, sums = make_plan(model), [], []
    real = torch.nn.functional.linear

    def watch(*args, **kwargs):
        moved = {name for name, p in model.named_parameters() if p.dtype == torch.float64 and ".layers." in name}
        blocks.append({name.split(".")[2] for name in moved})
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    made = saap.least_squares.NormalEquations.zeros

    def count(*args):
        gc.collect()
        sums.append(sum(type(found) is saap.least_squares.NormalEquations for found in gc.get_objects()))
        return made(*args)

    monkeypatch.setattr(saap.least_squares.NormalEquations, "zeros", count)
    saap.compensation(model, plan, **OPTIONS, inputs=inputs, stream=saap.Streaming(dtype=torch.float64))
    assert max(map(len, blocks)) == 1 and set().union(*blocks) == {"0", "1", "2"}
    assert max(sums) == 1  # o's when down's are made
