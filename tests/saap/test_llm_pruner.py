"""LLM-Pruner's criteria by name: the same scores as the explicit call, end to end, and what they cannot have."""

import json
import sys
from functools import partial

import pytest
import torch

import saap
from saap import micro_batches
from saap.criteria import score
from saap.evaluate_baselines import evaluate_baselines
from saap.micro_batches import in_micro_batches
from saap.prune import prune as prune_model
from saap.steps import Recipe, prune_in_steps
from tests.saap.command_line import run
from tests.saap.test_calibrate import token_ids
from tests.saap.test_cli import CALIBRATION, prune, workplace  # noqa: F401  # a fixture
from tests.saap.tiny import tiny_model

EXPLICIT = {
    "llm_pruner": ("element", {"coupled": True}),
    "llm_pruner_second": ("element", {"coupled": True, "order": "second"}),
    "llm_pruner_mixed": ("element", {"coupled": True, "order": "mixed"}),
    "llm_pruner_vector": ("vector", {"coupled": True}),
}
COUPLED = [name for name in EXPLICIT if name != "llm_pruner_second"]
OPTIONS = {"samples": 4, "seq_len": 12}
NONE_THERE = r"expected statistics with coupled salience, got none; .*\(saap calibrate --coupled\)"


def measured(model, **options) -> saap.Statistics:
    return saap.calibrate(model, data=token_ids(4), **OPTIONS, **options)


@pytest.fixture
def nothing_loads(monkeypatch) -> None:
    from saap.cli import calibrate as command
    from saap.cli import prune as other

    for module in (command, other):
        monkeypatch.setattr(module, "open_for_calibration", lambda *_: pytest.fail("loaded before the check"))


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("name", EXPLICIT)
def test_a_name_is_the_explicit_call(name: str, family: str) -> None:
    statistics = measured(tiny_model(family), coupled=True)
    criterion, options = EXPLICIT[name]
    for aggregation in ("sum", "max"):
        found = score(statistics, name, aggregation=aggregation)
        want = score(statistics, criterion, aggregation=aggregation, **options)
        for module in ("attention", "mlp"):
            # of second order the sequences are added in another order, in float64
            torch.testing.assert_close(getattr(found, module), getattr(want, module), rtol=1e-8, atol=0)
        assert found.settings["criterion"] == name and found.settings["aggregation"] == aggregation


def test_squares_need_no_coupled_statistics_and_the_others_do() -> None:
    plain = measured(tiny_model("llama"))
    assert not plain.coupled and torch.equal(
        score(plain, "llm_pruner_second").mlp, score(plain, "element", order="second").mlp
    )
    assert score(plain, "llm_pruner_second").fluctuation is not None
    for name in COUPLED:
        with pytest.raises(ValueError, match=NONE_THERE):
            score(plain, name)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", EXPLICIT)
def test_prune_collects_what_the_criterion_reads(name: str, steps: int) -> None:
    options = {"multiple": 1, "ratio_of": "blocks"}
    done = prune_model(
        tiny_model("llama"), data=token_ids(4), ratio=0.4, criterion=name, steps=steps, **options, **OPTIONS
    )
    criterion, explicit = EXPLICIT[name]
    by_hand = Recipe(partial(score, criterion=criterion, **explicit), options, OPTIONS | {"coupled": True}, steps=steps)
    want = prune_in_steps(tiny_model("llama"), None, token_ids(4), 0.4, by_hand)
    assert done.plan.layers == want.plan.layers and done.plan.settings["criterion"] == name
    assert done.statistics.coupled == (name in COUPLED)


def test_streaming_changes_nothing() -> None:
    plans = [
        prune_model(tiny_model("llama", torch.float32), data=token_ids(4), ratio=0.2, criterion="llm_pruner",
                    multiple=8, checkpoint=True, stream=stream, **OPTIONS).plan
        for stream in (False, True)
    ]  # fmt: skip
    assert plans[0] == plans[1]


def test_saved_coupled_statistics_serve_every_name(workplace, tmp_path) -> None:  # noqa: F811
    stats = tmp_path / "s.safetensors"
    run("calibrate", workplace / "dense", "--data", workplace / "text.txt", "--out", stats, *CALIBRATION, "--coupled")
    assert saap.Statistics.load(stats).coupled
    for name in EXPLICIT:
        plan, out = tmp_path / f"{name}.json", tmp_path / name
        run("plan", stats, "--ratio", 0.3, "--out", plan, "--multiple", 8, "--criterion", name)
        common = ("--ratio", 0.3, "--criterion", name)
        run("prune", workplace / "dense", "--statistics", stats, *common, "--out", out, "--multiple", 8)
        prune(workplace, *common, "--out", tmp_path / f"{name}-again")
        plans = [json.loads(file.read_text())["layers"] for file in (plan, out / "saap_plan.json")]
        plans.append(json.loads((tmp_path / f"{name}-again" / "saap_plan.json").read_text())["layers"])
        assert plans[0] == plans[1] == plans[2]


def test_baselines_get_coupled_statistics_in_every_step(workplace, tmp_path) -> None:  # noqa: F811
    options = ("--ratio", 0.3, "--eval", workplace / "text.txt", "--steps", 2, "--json")
    names = ",".join(EXPLICIT)
    rows = prune(workplace, *options, "--out", tmp_path / "a", "--baselines", names, "--no-report")
    row = json.loads(rows.stdout)["outputs"][0]
    assert list(row["baselines"]) == list(EXPLICIT)
    own = prune(workplace, *options, "--out", tmp_path / "b", "--criterion", "llm_pruner", "--no-report")
    found = json.loads(own.stdout)["outputs"][0]["evaluation"]["perplexity"]
    assert row["baselines"]["llm_pruner"]["perplexity"] == found


@pytest.mark.parametrize("which", [("--criterion", "llm_pruner"), ("--baselines", "llm_pruner_vector")])
@pytest.mark.usefixtures("nothing_loads")
def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(workplace, tmp_path, which: tuple) -> None:  # noqa: F811
    text = ("--eval", workplace / "text.txt", "--out", tmp_path / "out", "--ratio", 0.2, *which)
    for options, message in (
        (("--batch-size", 2), "need all 4 samples in one micro-batch of one process; got batch_size 2 and 1 processes"),
        (("--steps", 2, "--step-samples", 2), "which coupled ones do not allow; criterion 'llm_pruner"),
    ):
        result = prune(workplace, *text, *options, code=2)
        assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", [("--criterion", "llm_pruner"), ("--baselines", "llm_pruner_vector")])
def test_statistics_without_coupled_ones_are_refused_before_the_model_is_loaded(
    workplace, tmp_path, which: tuple, request  # noqa: F811
) -> None:  # fmt: skip
    stats = tmp_path / "s.safetensors"
    run("calibrate", workplace / "dense", "--data", workplace / "text.txt", "--out", stats, *CALIBRATION)
    request.getfixturevalue("nothing_loads")
    text = ("--eval", workplace / "text.txt", "--statistics", stats)
    result = run("prune", workplace / "dense", *text, "--ratio", 0.2, "--out", tmp_path / "o", *which, code=2)
    assert f"criterion '{which[1]}': expected statistics with coupled salience, got none" in result.stderr
    assert "saap calibrate --coupled" in result.stderr and not (tmp_path / "o").exists()


@pytest.mark.usefixtures("nothing_loads")
def test_calibrate_refuses_several_passes_and_processes(workplace, tmp_path, monkeypatch) -> None:  # noqa: F811
    common = ("calibrate", workplace / "dense", "--data", workplace / "text.txt", "--out", tmp_path / "s.safetensors")
    message = run(*common, *CALIBRATION, "--coupled", "--batch-size", 3, code=2).stderr
    assert "need all 4 samples in one micro-batch of one process; got batch_size 3" in message
    monkeypatch.setattr("saap.distributed.world_size", lambda: 2)
    message = run(*common, *CALIBRATION, "--coupled", code=2).stderr
    assert "got batch_size auto and 2 processes" in message and "fewer --samples take less memory" in message


def test_python_refuses_before_the_dense_model_is_evaluated_or_changed(monkeypatch) -> None:
    module = sys.modules["saap.prune"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "evaluate", lambda *_a, **_k: pytest.fail("evaluated before the check"))
    model = tiny_model("llama")
    plain, coupled = measured(model), measured(model, coupled=True)
    common = {"ratio": 0.2, "criterion": "llm_pruner", "multiple": 1, "data": token_ids(8), "eval_text": token_ids(2)}
    for options, message in (
        ({"statistics": plain}, NONE_THERE),
        ({"batch_size": 2}, "need all 4 samples in one micro-batch"),
        ({"statistics": coupled, "steps": 2, "batch_size": 2}, "need all 4 samples in one micro-batch"),
        ({"statistics": coupled, "steps": 2, "step_samples": 2}, "coupled ones do not allow"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_model(model, **common, **OPTIONS, **options)
    assert saap.discover(model) == plain.units
    del common["eval_text"]  # the batch size is of compensation alone where statistics are given
    prune_model(model, **common, **OPTIONS, statistics=coupled, batch_size=2, compensate="bias")
    with pytest.raises(ValueError, match=NONE_THERE):
        evaluate_baselines(
            ["llm_pruner"], tiny_model("llama"), None, token_ids(2), None, plain, 0.2, Recipe(search={"multiple": 1})
        )


def test_too_little_memory_for_one_pass_is_refused_and_says_what_helps(workplace, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(micro_batches, "available_bytes", lambda _device: 1000)
    options = ("--ratio", 0.2, "--out", tmp_path / "out")
    for dry in (("--dry-run",), ()):
        said = prune(workplace, *options, "--criterion", "llm_pruner", *dry, code=2).stderr
        assert not (tmp_path / "out").exists()
        assert "coupled statistics take all 4 samples of 16 tokens in one backward pass: about 0.0 GiB" in said
        assert "fewer samples (--samples)" in said and "a smaller --batch-size is no way out" in said
        prune(workplace, *options, *dry)  # other criteria take what fits


def test_a_device_that_runs_out_of_memory_in_one_pass_says_what_helps() -> None:
    def step(_rows: slice) -> None:
        raise torch.OutOfMemoryError("planted")

    with pytest.raises(torch.OutOfMemoryError, match=r"4 sequences must go .* fewer samples \(--samples\).*planted"):
        in_micro_batches(4, 4, step, fixed=True)
