"""Compensation on the pruned model's own inputs, block after block: what it aims at, and what it leaves alone."""

import copy

import pytest
import torch
from torch import Tensor

import saap
from saap import compensation_sweep
from saap.families import family_of, layers_of
from saap.plan import LayerPlan, Plan
from tests.saap.test_checkpoint import make_plan
from tests.saap.test_compensate import DAMPING, DATA, OPTIONS, PLAIN, assert_close, kept_of, operands, parts_of, ridge
from tests.saap.tiny import tiny_model


@torch.no_grad()
def streams(model) -> dict[tuple[int, str], Tensor]:
    """Hidden states (T, D) behind o and behind down of every block, as blocks without post-norms add them up."""
    seen, handles = {}, []
    for index, layer in enumerate(layers_of(model, family_of(model))):

        def hook(_m, args, kwargs, out, index=index) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            seen[index, "o"] = before.flatten(0, -2)
            seen[index, "down"] = (out[0] if isinstance(out, tuple) else out).flatten(0, -2)

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    outputs = operands(model)
    for handle in handles:
        handle.remove()
    return {key: each + outputs[key][1] if key[1] == "o" else each for key, each in seen.items()}


@pytest.mark.parametrize("family", ["plain llama", "opt", "gemma2"])
def test_pruned_inputs_give_the_ridge_solution_one_linear_after_another(family: str) -> None:
    """The oracle runs a whole copy whose o and down have zero columns where features are gone.

    What a Linear shall add is what the copy's hidden states lack of the dense model's; under Gemma 2's post-norms
    what its own output lacks.
    """
    model = tiny_model("llama", **PLAIN) if family == "plain llama" else tiny_model(family)
    plan, thinned = make_plan(model), copy.deepcopy(model)
    found = saap.compensation(model, plan, **OPTIONS, inputs="pruned", damping=DAMPING)
    dense, wanted, behind = operands(model), streams(model), False
    for (index, part), linear in parts_of(thinned).items():
        kept = kept_of(plan, index, part)
        with torch.no_grad():  # only kept columns count, also in what is lacking before there is a solution
            linear.weight[:, [c for c in range(linear.in_features) if c not in kept]] = 0
        behind |= len(kept) < linear.in_features
        if not behind:
            assert part not in found.layers[index]
            continue
        x, y = operands(thinned)[index, part]
        lacking = (
            dense[index, part][1] - y if family == "gemma2" else (wanted[index, part] - streams(thinned)[index, part])
        )
        affine, own = linear.bias is not None, linear.weight[:, kept]
        weight, bias = ridge(x[:, kept], x[:, kept] @ own.T + lacking, own, affine)
        assert_close(found.layers[index][part].weight, weight)
        with torch.no_grad():
            linear.weight[:, kept] = weight
            if affine:
                linear.bias += bias
                assert_close(found.layers[index][part].bias, linear.bias)


@pytest.mark.parametrize(("family", "caution"), [("plain llama", 30.0), ("gemma2", 1.0)])
def test_automatic_damping_is_larger_where_much_is_not_for_one_linear_to_explain(family: str, caution: float) -> None:
    model = tiny_model("llama", **PLAIN) if family == "plain llama" else tiny_model(family)
    plan = make_plan(model)
    found = saap.compensation(model, plan, **OPTIONS, inputs="pruned")
    index = next(i for i, layer in enumerate(plan.layers) if len(layer.kv_heads) < plan.units.layers[i].kv_heads)
    assert not any(found.layers[:index])  # so the first o that loses some has the dense model's inputs
    x, y = operands(model)[index, "o"]
    kept, linear = kept_of(plan, index, "o"), parts_of(model)[index, "o"]
    affine = linear.bias is not None
    own = y - linear.bias if affine else y
    weight, _ = ridge(x[:, kept], own, linear.weight[:, kept], affine, caution * len(kept) / len(x))
    assert_close(found.layers[index]["o"].weight, weight)


def test_auto_is_pruned_inputs_for_least_squares_and_dense_ones_otherwise() -> None:
    model = tiny_model("llama", torch.float32)
    plan = make_plan(model)
    for method, meant in (("least_squares", "pruned"), ("bias", "dense")):
        found, wanted = (saap.compensation(model, plan, **OPTIONS, method=method, inputs=i) for i in ("auto", meant))
        assert found.settings == wanted.settings and found.settings["compensation_inputs"] == meant
        for mine, theirs in zip(found.layers, wanted.layers, strict=True):
            for part, new in theirs.items():
                for name in ("weight", "bias"):
                    assert (getattr(new, name) is None) == (getattr(mine[part], name) is None)
                    assert getattr(new, name) is None or torch.equal(getattr(new, name), getattr(mine[part], name))


def test_prune_takes_the_inputs_it_is_asked_for() -> None:
    made = [
        saap.prune(
            tiny_model("llama", torch.float32), **OPTIONS, ratio=0.2, multiple=1,
            compensate="least_squares", compensation_inputs=inputs,
        )
        for inputs in ("auto", "dense")
    ]  # fmt: skip
    assert [result.plan.settings["compensation_inputs"] for result in made] == ["pruned", "dense"]
    with torch.no_grad():
        assert not torch.equal(*(result.model(DATA).logits for result in made))
    with pytest.raises(ValueError, match="compensation inputs must be one of auto, dense, pruned; got 'none'"):
        saap.prune(tiny_model("llama"), **OPTIONS, ratio=0.2, compensate="bias", compensation_inputs="none")


def test_protected_layers_are_left_as_they_are() -> None:
    model = tiny_model("llama", torch.float32, **PLAIN)
    before = copy.deepcopy(layers_of(model, family_of(model))[2].state_dict())
    options = {"ratio": 0.1, "multiple": 1, "compensate": "least_squares"}
    pruned = saap.prune(model, **OPTIONS, **options, protect=(2,)).model
    after = layers_of(pruned, family_of(pruned))[2].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    free = saap.prune(tiny_model("llama", torch.float32, **PLAIN), **OPTIONS, **options).model
    assert not torch.equal(layers_of(free, family_of(free))[2].state_dict()["mlp.down_proj.weight"][:, :8],
                           before["mlp.down_proj.weight"][:, :8])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_that_adds_little_is_known_to_add_and_a_post_norm_is_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before = torch.randn(2, 50, 64).to(dtype)
    for share in (1.0, 0.1, 0.01):  # of the hidden states' norm; 16 bits round away much of a hundredth
        o, down = (share * torch.randn(2, 50, 64)).to(dtype), (share * torch.randn(2, 50, 64)).to(dtype)
        seen = {"o": (before, o), "down": (before, down)}
        assert compensation_sweep._adds(before, seen, before + o + down)
    normed = torch.nn.functional.rms_norm((o + down).float(), (64,)).to(dtype)
    assert not compensation_sweep._adds(before, seen, before + normed)


def test_a_plan_with_nothing_to_compensate_says_so_and_runs_nothing(monkeypatch) -> None:
    monkeypatch.setattr(compensation_sweep.Sweep, "run", lambda _self: pytest.fail("a pass was run"))
    model = tiny_model("llama")
    units = saap.discover(model)
    whole = Plan(units, tuple(LayerPlan(tuple(range(s.kv_heads)), tuple(range(s.count("mlp")))) for s in units.layers))
    with pytest.warns(UserWarning, match="nothing to compensate"):
        found = saap.compensation(model, whole, **OPTIONS)
    assert found.settings == {"compensate": "none"} and not any(found.layers)


def test_the_bytes_of_the_largest_layers_sums() -> None:
    plan = make_plan(tiny_model("llama"))
    sizes = [[len(kept_of(plan, index, part)) for part in ("o", "down")] for index in range(len(plan.layers))]
    hidden = plan.units.layers[0].hidden_size
    # Gram (K, K) and cross (K, D) of both Linears: 8 bytes a number, and 4 of one micro-batch's
    assert compensation_sweep._equations_bytes(plan) == max(sum(12 * k * (k + hidden) for k in own) for own in sizes)
    mixture = make_plan(tiny_model("mixtral"))
    sizes = [
        [len(layer.features("o", own)), *[layer.width] * len(layer.experts)]
        for layer, own in zip(mixture.layers, mixture.units.layers, strict=True)
    ]
    assert compensation_sweep._equations_bytes(mixture) == max(sum(12 * k * (k + 64) for k in own) for own in sizes)
