"""The damped solution, singular Gram matrices, and what compensation refuses."""

import subprocess
import sys

import pytest
import torch

import saap
from saap.least_squares import NormalEquations
from tests.saap.test_checkpoint import make_plan
from tests.saap.test_compensate import DATA, OPTIONS, PLAIN
from tests.saap.test_distributed import RENDEZVOUS
from tests.saap.tiny import tiny_model


def problem(tokens: int = 200, inputs: int = 12, outputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, dtype=torch.float64, generator=generator) + 0.5
    return x, torch.randn(tokens, outputs, dtype=torch.float64, generator=generator) + x[:, :outputs]


def equations(x: torch.Tensor, r: torch.Tensor) -> NormalEquations:
    found = NormalEquations.zeros(x.shape[1], r.shape[1])
    for rows in torch.arange(len(x)).split(64):
        found.merge_(NormalEquations.of(x[rows], r[rows]))
    return found


def test_sums_of_fp32_micro_batches_keep_the_digits_of_float64() -> None:
    x, r = problem(20000)
    single, double = equations(x.float(), r.float()), equations(x.float().double(), r.float().double())
    assert single.gram.dtype == torch.float64 and single.tokens == 20000
    # products of 64 fp32 tokens round by less than 1e-6 each; their float64 sum adds nothing
    torch.testing.assert_close(single.gram, double.gram, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("affine", [False, True])
def test_the_solution_is_where_the_gradient_of_the_objective_vanishes(affine: bool) -> None:
    x, r = problem()
    change, shift = equations(x, r).solve(0.01, affine)
    error = r - x @ change.T - shift
    centred = x - x.mean(0) if affine else x
    penalty = 0.01 * centred.square().sum(0).mean() * change
    torch.testing.assert_close(error.T @ x, penalty, rtol=1e-9, atol=1e-9)
    if affine:
        assert error.mean(0).abs().max() < 1e-12
    else:
        assert not shift.any()


def test_dead_inputs_get_nothing_and_duplicates_share() -> None:
    x, r = problem()
    x[:, 3] = 0
    x[:, 7] = x[:, 6]
    change, _ = equations(x, r).solve(1e-6, affine=False)
    assert not change[:, 3].any()
    torch.testing.assert_close(change[:, 6], change[:, 7], rtol=1e-5, atol=1e-5)  # as far as damping 1e-6 decides it
    unique = x[:, [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]]
    wanted = torch.linalg.lstsq(unique, r).solution
    torch.testing.assert_close(x @ change.T, unique @ wanted, rtol=1e-4, atol=1e-4)


def test_fewer_tokens_than_inputs_fit_exactly_with_the_smallest_change() -> None:
    x, r = problem(tokens=8)
    change, _ = equations(x, r).solve(1e-9, affine=False)
    torch.testing.assert_close(change.T, torch.linalg.pinv(x) @ r, rtol=1e-5, atol=1e-6)  # damping 1e-9 of 1 / 1e-3


def test_automatic_damping_is_inputs_over_tokens() -> None:
    x, r = problem()
    assert torch.equal(equations(x, r).solve("auto", True)[0], equations(x, r).solve(12 / 200, True)[0])


def test_all_inputs_zero_or_none_at_all_change_nothing() -> None:
    x, r = problem()
    change, _ = equations(torch.zeros_like(x), r).solve(1e-3, affine=False)
    assert change.shape == (5, 12) and not change.any()
    change, shift = equations(x[:, :0], r).solve(1e-3, affine=True)
    assert change.shape == (5, 0)
    torch.testing.assert_close(shift, r.mean(0))


def test_damping_too_small_for_float64_grows_tenfold_until_it_is_not() -> None:
    x, r = problem()
    x[:, 7] = x[:, 6]
    wanted, _ = equations(x, r).solve(1e-14, affine=False)
    found, _ = equations(x, r).solve(1e-17, affine=False)
    torch.testing.assert_close(x @ found.T, x @ wanted.T, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="the Gram matrix of layer 3, down stays singular with damping 1e-24, ten to"):
        equations(x, r).solve(1e-30, affine=False, name="layer 3, down")


@pytest.mark.parametrize("where", ["inputs", "residual"])
def test_sums_that_are_not_finite_are_named(where: str) -> None:
    x, r = problem()
    (x if where == "inputs" else r)[5, 2] = float("nan")
    with pytest.raises(ValueError, match="found NaN or inf in those of layer 3, down"):
        equations(x, r).solve(1e-3, affine=False, name="layer 3, down")


def test_a_singular_layer_is_solved_and_a_hopeless_damping_names_layer_and_matrix() -> None:
    model = tiny_model("llama", **PLAIN)
    plan = make_plan(model)
    with torch.no_grad():
        for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            linear.weight[6] = linear.weight[5]  # channels 5 and 6, both kept
            linear.weight[7] = 0
    plan = make_plan(model)
    found = saap.compensation(model, plan, **OPTIONS)
    own = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(found.layers[1]["down"].weight[:, 2], own[:, 7])  # dead: nothing is known of it
    few = saap.compensation(model, plan, data=DATA[:1], samples=1, seq_len=16)  # fewer tokens than channels
    assert all(torch.isfinite(new.weight).all() for layer in few.layers for new in layer.values())
    with pytest.raises(ValueError, match="Gram matrix of layer 1, mlp.down_proj stays singular with damping 1e-24"):
        saap.compensation(model, plan, **OPTIONS, damping=1e-30)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weight", "found NaN or inf in model.layers.1.mlp.up_proj.weight"),
        ("activation", "found NaN or inf in the output of layer 1 for sequences 0 to 1"),
        ("embedding", "found NaN or inf in input embeddings.weight"),
    ],
)
def test_what_is_not_finite_is_named(where: str, message: str, inputs: str) -> None:
    model = tiny_model("llama", torch.float32, **PLAIN)
    with torch.no_grad():
        if where == "weight":
            model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
        elif where == "activation":
            model.model.layers[1].input_layernorm.weight[0] = float("inf")
        else:
            model.model.embed_tokens.weight[3, 2] = float("inf")
    with pytest.raises(ValueError, match=message):
        saap.compensation(model, make_plan(model), **OPTIONS, inputs=inputs)


def test_weights_beyond_the_models_dtype_are_refused() -> None:
    model = tiny_model("llama", torch.float16, **PLAIN)
    with torch.no_grad():
        linear = model.model.layers[0].mlp.down_proj
        linear.weight.mul_(1e5)  # near the largest float16
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-4)
    plan = make_plan(model)
    with pytest.raises(
        ValueError, match="compensation of layer 0, mlp.down_proj overflows torch.float16; use a larger"
    ):
        saap.compensation(model, plan, **OPTIONS, damping=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "none"}, "method must be one of bias, least_squares; got 'none'"),
        ({"inputs": "both"}, "inputs must be one of auto, dense, pruned; got 'both'"),
        ({"damping": 0}, 'damping must be "auto" or a positive number; got 0'),
        ({"damping": float("nan")}, 'damping must be "auto" or a positive number; got nan'),
        ({"damping": "much"}, 'damping must be "auto" or a positive number; got .much.'),
        ({"data": None}, "expected calibration or evaluation text, got none"),
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"seq_len": 65}, "seq_len must lie between 2 and the model's 64 positions; got 65"),
        ({"batch_size": 0}, 'batch_size must be "auto" or a positive integer; got 0'),
        ({"samples": 99}, "99 samples of 24 tokens need 2376 tokens, found 216"),
    ],
)
def test_bad_arguments_are_refused_before_work(monkeypatch, options: dict, message: str) -> None:
    model = tiny_model("llama", torch.float32)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ValueError, match=message):
        saap.compensation(model, make_plan(model), **OPTIONS | options)


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="this plan was made for a llama model with fingerprint"):
        saap.compensation(tiny_model("llama"), make_plan(tiny_model("llama", seed=1)), **OPTIONS)


TWO = """
import sys, torch, saap
from saap.distributed import process_group
from tests.saap.test_checkpoint import make_plan
from tests.saap.test_compensate import OPTIONS, PLAIN
from tests.saap.tiny import tiny_model
torch.set_num_threads(1)
model = tiny_model("llama", **PLAIN)
with process_group() as rank:
    for inputs in ("dense", "pruned"):
        found = saap.compensation(model, make_plan(model), **OPTIONS, inputs=inputs)
        weights = {f"{i}.{part}": new.weight for i, layer in enumerate(found.layers) for part, new in layer.items()}
        torch.save(weights, f"{sys.argv[1]}/{inputs}-{rank}.pt")
"""


def test_two_processes_share_the_sequences_and_agree(tmp_path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", *RENDEZVOUS, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_with_this_checkout())
    assert done.returncode == 0, done.stderr
    model = tiny_model("llama", **PLAIN)
    for inputs in ("dense", "pruned"):
        one = saap.compensation(model, make_plan(model), **OPTIONS, inputs=inputs)
        zero, first = (torch.load(tmp_path / f"{inputs}-{rank}.pt") for rank in (0, 1))
        for index, layer in enumerate(one.layers):
            for part, new in layer.items():
                assert torch.equal(zero[f"{index}.{part}"], first[f"{index}.{part}"])
                torch.testing.assert_close(zero[f"{index}.{part}"], new.weight, rtol=1e-9, atol=1e-9)  # order of sums


def _with_this_checkout() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
