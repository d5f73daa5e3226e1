"""Scores by what least squares cannot make up for: against materialised inputs, and what must not change them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import saap
from saap.backward_elimination import costs_in_turn
from saap.compensated_scores import tokens_per_input
from saap.criteria import score
from saap.steps import Recipe, prune_in_steps
from saap.stream import Streaming
from saap.units import MODULES, LayerUnits, discover, module_of
from tests.saap.test_calibrate import FAMILIES
from tests.saap.test_compensate import DATA, OPTIONS, operands, parts_of
from tests.saap.test_experts import calls_of, outputs_of, with_an_idle_expert
from tests.saap.test_stream import state_of
from tests.saap.tiny import MIXTURES, tiny_model

CALIBRATION = {name: OPTIONS[name] for name in ("samples", "seq_len", "batch_size")}


def scored(model, criterion: str = "saap") -> saap.Scores:
    return score(saap.calibrate(model, data=DATA, **CALIBRATION), criterion)


def damped_gram(inputs: torch.Tensor, affine: bool) -> torch.Tensor:
    """Of inputs (T, K), with the damping that ``compensation`` calls "auto"."""
    centred = inputs - inputs.mean(0) if affine else inputs
    gram = centred.T @ centred
    return gram + len(gram) / len(inputs) * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_taken_over_its_own_inputs(family: str) -> None:
    model = tiny_model(family)
    before = scored(model)
    found = saap.compensated_scores(before, model, **OPTIONS)
    for (index, part), (x, _) in operands(model).items():
        linear, module = parts_of(model)[index, part], module_of(part)
        wanted = costs_in_turn(
            damped_gram(x, linear.bias is not None), linear.weight.detach(), before.layer(index, module)
        )
        # float64 throughout; sums in another order, inverses of condition 1e4
        torch.testing.assert_close(found.layer(index, module), wanted, rtol=1e-8, atol=0)
    widest = max(x.shape[1] for x, _ in operands(model).values())
    settings = {"compensated_scores": True, "tokens_per_input": round(9 * 24 / widest, 2)}
    assert found.settings == before.settings | settings
    assert found.fluctuation is before.fluctuation and found.experts is before.experts


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, 1000 / 40),  # down
        ({"query_heads": 8}, 1000 / 64),  # o
        ({"query_heads": 0, "kv_heads": 0, "intermediate_size": 50}, 1000 / 50),
        ({"query_heads": 0, "kv_heads": 0, "intermediate_size": 0}, 1000),
        ({"experts": 8, "experts_per_token": 2}, 1000 / 40 / 4),  # each expert sees a quarter of the tokens
    ],
)
def test_tokens_for_every_input_are_those_of_the_widest_linear(changes, wanted: float) -> None:
    units = discover(tiny_model("llama"))
    layer = LayerUnits(
        hidden_size=32, query_heads=4, kv_heads=2, head_dim=8, intermediate_size=40, gated=True
    )  # fmt: skip
    wide = replace(layer, **changes)
    found = tokens_per_input(
        replace(units, layers=(replace(wide, intermediate_size=min(8, wide.intermediate_size)), wide)), 1000
    )
    assert found == round(wanted, 2)


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_taken_over_its_own_tokens(family: str) -> None:
    model = with_an_idle_expert(tiny_model(family))
    before = scored(model)
    found = saap.compensated_scores(before, model, **OPTIONS)
    idle = 0
    for index, (hidden, chosen, _) in enumerate(calls_of(model, DATA)):
        experts = model.model.layers[index].mlp.experts
        alone, turns = (each.layer(index, "mlp").chunk(len(experts.down_proj)) for each in (before, found))
        for expert in range(len(alone)):
            mine = hidden[(chosen == expert).any(1)]
            if not len(mine):
                assert torch.equal(turns[expert], alone[expert])
                idle += 1
                continue
            inner, _ = outputs_of(experts, expert, mine)
            wanted = costs_in_turn(
                damped_gram(inner.detach(), False), experts.down_proj[expert].detach(), alone[expert]
            )
            torch.testing.assert_close(turns[expert], wanted, rtol=1e-8, atol=0)
    assert idle


def test_streaming_and_micro_batches_change_nothing_and_the_model_stays(tmp_path) -> None:
    model = tiny_model("llama").train()
    before, state = scored(model), state_of(model)
    plain = saap.compensated_scores(before, model, **OPTIONS)
    for options in ({"batch_size": 9}, {"stream": Streaming(folder=tmp_path)}):
        other = saap.compensated_scores(before, model, **OPTIONS | options)
        for module in MODULES:  # float64; another order of sums
            torch.testing.assert_close(getattr(other, module), getattr(plain, module), rtol=1e-9, atol=0)
    assert model.training and state_of(model) == state and not list(tmp_path.iterdir())


def test_progress_counts_sequences_times_blocks() -> None:
    model, seen = tiny_model("llama"), []
    saap.compensated_scores(scored(model), model, **OPTIONS, progress=lambda *each: seen.append(each))
    assert seen[-1] == (9 * 3, 9 * 3) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_attention_that_is_gone_has_no_scores() -> None:
    model = tiny_model("llama")
    units = discover(model)
    layers = [
        saap.LayerPlan(tuple(range(each.kv_heads)), tuple(range(each.intermediate_size))) for each in units.layers
    ]
    layers[1] = saap.LayerPlan((), layers[1].channels)
    model = saap.compact(model, saap.Plan(units, tuple(layers), {"allow_empty": True}))
    before = scored(model)
    found = saap.compensated_scores(before, model, **OPTIONS)
    assert found.layer(1, "attention").shape == (0,) and not torch.equal(found.mlp, before.mlp)


def test_what_does_not_fit_is_refused_before_the_pass() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"these scores belong to a opt model with fingerprint \w+; got a llama model"):
        saap.compensated_scores(scored(tiny_model("opt")), model, **OPTIONS)
    before = scored(model)
    with pytest.raises(ValueError, match="samples"):
        saap.compensated_scores(before, model, data=DATA, samples=0)
    with pytest.raises(ValueError, match="these are compensated already"):
        saap.compensated_scores(saap.compensated_scores(before, model, **OPTIONS), model, **OPTIONS)


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_model("llama")
    before = scored(model)
    with torch.no_grad():
        parts_of(model)[1, "down"].weight[0, 0] = float("nan")
    broken = replace(before, units=discover(model))  # calibration would have refused the model
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight"):
        saap.compensated_scores(broken, model, **OPTIONS)


def recipe(**changes) -> Recipe:
    return Recipe(search={"multiple": 8, "ratio_of": "blocks"}, calibration=CALIBRATION, **changes)


@pytest.mark.parametrize("enough", [True, False])
def test_least_squares_follows_a_search_by_compensated_scores_of_enough_text(monkeypatch, enough: bool) -> None:
    monkeypatch.setattr("saap.steps.ENOUGH", 2.2 if enough else 2.3)  # there are 216 tokens for 97 inputs
    plans = {}
    for choice in ("auto", True, False):
        model = tiny_model("llama")
        made = recipe(compensate="least_squares", compensated_scores=choice)
        plans[choice] = prune_in_steps(model, None, DATA, 0.4, made).plan
    assert plans["auto"].layers == plans[enough].layers != plans[not enough].layers
    settings = {choice: plan.settings for choice, plan in plans.items()}
    assert [settings[choice].get("compensated_scores") for choice in plans] == [enough, True, None]
    assert [settings[choice].get("tokens_per_input") for choice in plans] == [2.23, 2.23, None]
    model = tiny_model("llama")
    scores = saap.compensated_scores(scored(model), model, **OPTIONS)
    assert plans[True].layers == saap.search(scores, 0.4, multiple=8, ratio_of="blocks").layers


@pytest.mark.parametrize(
    ("calibration", "compensated"),
    [
        ({"samples": 80, "seq_len": 32}, True),  # forty tokens for each of o's 64 inputs
        ({"samples": 79, "seq_len": 32}, False),
        ({"samples": 4}, False),  # of 512 tokens
        ({"samples": 5}, True),
        ({"seq_len": 19}, False),  # 128 samples
        ({"seq_len": 20}, True),
    ],
)
def test_scores_are_compensated_from_forty_tokens_for_every_input(calibration, compensated: bool) -> None:
    units = discover(tiny_model("llama", intermediate_size=48))
    made = {choice: Recipe(calibration=calibration, compensate="least_squares", compensated_scores=choice)
            for choice in ("auto", True, False)}  # fmt: skip
    assert [each.compensates_scores(units) for each in made.values()] == [compensated, True, False]


@pytest.mark.parametrize(
    ("changes", "compensated"),
    [
        ({"compensate": "none"}, False),
        ({"compensate": "bias"}, False),
        ({"compensate": "least_squares", "criterion": "element"}, False),
        ({"compensate": "least_squares", "search": {"method": "standardised"}}, False),
        ({"compensate": "least_squares", "search": {"method": "uniform"}}, True),
        ({"compensate": "least_squares", "criterion": "element", "compensated_scores": True}, True),
    ],
)
def test_scores_are_compensated_where_that_was_measured_to_help(changes, compensated: bool) -> None:
    units = discover(tiny_model("llama"))  # for which the default of 65536 tokens is plenty
    assert Recipe(**changes).compensates_scores(units) == compensated


@pytest.mark.parametrize(("choice", "stages"), [(True, 3), ("auto", 2)])
def test_every_step_and_every_stage_of_it_is_counted(choice: bool | str, stages: int) -> None:
    seen = []
    made = recipe(compensate="least_squares", steps=2, compensated_scores=choice)
    done = prune_in_steps(tiny_model("llama"), None, DATA, 0.4, made, progress=lambda *each: seen.append(each))
    assert done.plan.settings["compensated_scores"] == (choice is True) and done.plan.settings["steps"] == 2
    assert done.plan.settings["tokens_per_input"] == 2.23  # of the dense model's inputs in the last step too
    total = 2000 * stages  # of little text "auto" has no stage of scores
    assert {each for _, each in seen} == {total} and seen[-1] == (total, total)
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compensated_scores": "yes"}, "compensated_scores must be True, False or \"auto\"; got 'yes'"),
        ({"compensated_scores": True}, "expected compensate 'least_squares', got 'none'"),
        ({"compensated_scores": 1}, 'must be True, False or "auto"; got 1'),
        ({"compensated_scores": True, "compensate": "least_squares", "criterion": "random"}, "random does not"),
        ({"compensated_scores": True, "compensate": "bias"}, "expected compensate 'least_squares', got 'bias'"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def _ranked(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'join'}", rank=rank, world_size=2)
    model = tiny_model("llama")
    before = replace(torch.load(folder / "scores.pt", weights_only=False), units=discover(model))
    found = saap.compensated_scores(before, model, **OPTIONS)
    torch.save((found.attention, found.mlp, found.settings), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_sequences_and_have_equal_scores(tmp_path) -> None:
    model = tiny_model("llama")
    before = scored(model)
    torch.save(before, tmp_path / "scores.pt")
    torch.multiprocessing.spawn(_ranked, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = saap.compensated_scores(before, model, **OPTIONS)
    assert first[2] == second[2] == alone.settings  # of the tokens of both
    for mine, theirs, wanted in zip(first[:2], second[:2], (alone.attention, alone.mlp), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=0)  # float64; sums in another order
