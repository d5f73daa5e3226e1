"""``--for`` on the command line: plans, sweeps, steps, given plans, and what is refused before any work."""

import json
from dataclasses import replace

import pytest
import torch

import saap
from saap.plan import Plan
from saap.units import discover
from tests.saap.command_line import run
from tests.saap.test_cli import CALIBRATION
from tests.saap.test_tensor_parallel import random_scores
from tests.saap.tiny import tiny_tokenizer
from tests.serving.test_targets import assert_taken, wide_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model whose sizes no target but transformers and vLLM takes, its text and its statistics."""
    folder = tmp_path_factory.mktemp("targets")
    saap.save(wide_model("llama"), folder / "dense", tokenizer=tiny_tokenizer())
    letters = "the quick brown fox jumps over lazy dogs. "
    (folder / "text.txt").write_text("\n\n".join(letters[i:] + letters[:i] for i in range(40)))
    run("calibrate", folder / "dense", "--data", folder / "text.txt", *CALIBRATION, "--out", folder / "s.safetensors")
    return folder


def prune(place, *arguments: object, code: int = 0):
    common = ("prune", place / "dense", "--data", place / "text.txt", *CALIBRATION, "--no-report")
    return run(*common, *arguments, code=code)


def refused(result) -> str:
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("target", ["transformers", "vllm", "llama.cpp", "edge", "gpu"])
def test_prune_for_a_target_is_valid_by_check(place, tmp_path, target: str) -> None:
    run("check", place / "dense", "--for", target, code=int(target in ("llama.cpp", "edge", "gpu")))
    prune(place, "--ratio", 0.3, "--for", target, "--out", tmp_path / "out")
    assert "valid" in run("check", tmp_path / "out", "--for", target).stdout
    assert_taken(tmp_path / "out", saap.load(tmp_path / "out"), target)
    assert f"target {target}" in " ".join(run("info", tmp_path / "out").stdout.split())


def test_a_sweep_in_steps_is_valid_at_every_ratio(place, tmp_path) -> None:
    prune(place, "--ratio", "0.2,0.4,0.6", "--for", "llama.cpp", "--steps", 2, "--out", tmp_path / "out")
    for ratio in ("0.2", "0.4", "0.6"):
        run("check", tmp_path / f"out/ratio-{ratio}", "--for", "llama.cpp", "--type", "q8_0")


def test_plans_for_a_target_are_the_search_s(place, tmp_path) -> None:
    run(
        "plan", place / "s.safetensors", "--ratio", 0.3, "--for", "gpu", "--tensor-parallel", 2, "--out", tmp_path / "p"
    )
    made = Plan.load(tmp_path / "p")
    scores = saap.score(saap.Statistics.load(place / "s.safetensors"))
    assert made == saap.search(scores, 0.3, target="gpu", tensor_parallel=2)
    run("plan", place / "s.safetensors", "--ratio", 0.3, "--for", "transformers", "--out", tmp_path / "q")
    assert Plan.load(tmp_path / "q").layers == saap.search(scores, 0.3).layers


def test_a_given_plan_is_checked_for_the_target_and_says_it(place, tmp_path) -> None:
    for target in ("llama.cpp", "vllm"):
        run(
            "plan",
            place / "s.safetensors",
            "--ratio",
            0.3,
            "--for",
            target,
            "--multiple",
            32,
            "--out",
            tmp_path / target,
        )
    out = ("--out", tmp_path / "out", "--plan")
    told = refused(run("prune", place / "dense", *out, tmp_path / "vllm", "--for", "edge", code=2))
    assert "target='edge' does not take" in told and not (tmp_path / "out").exists()
    run("prune", place / "dense", *out, tmp_path / "llama.cpp", "--for", "vllm", "--no-report")
    assert Plan.load(tmp_path / "out/saap_plan.json").settings["target"] == "vllm"
    assert Plan.load(tmp_path / "out/saap_plan.json").layers == Plan.load(tmp_path / "llama.cpp").layers
    told = refused(run("prune", place / "dense", *out, tmp_path / "vllm", "--multiple", 64, code=2))
    assert "expected no --multiple beside it" in told


def test_an_edited_plan_is_refused_with_the_layer(place, tmp_path) -> None:
    run("plan", place / "s.safetensors", "--ratio", 0.3, "--for", "llama.cpp", "--out", tmp_path / "p")
    body = json.loads((tmp_path / "p").read_text())
    body["layers"][2]["channels_kept"] = "0-99"
    (tmp_path / "p").write_text(json.dumps(body))
    told = refused(run("prune", place / "dense", "--plan", tmp_path / "p", "--out", tmp_path / "out", code=2))
    assert "layer 2: target='llama.cpp' does not take 100 channels; expected a multiple of 32" in told


@pytest.mark.parametrize("doing", [("--no-report",), ("--dry-run",)])
def test_a_plan_remembers_the_target_that_its_execution_must_serve(tmp_path, doing: tuple) -> None:
    model = wide_model("qwen3")
    saap.save(model, tmp_path / "dense", tokenizer=tiny_tokenizer())
    plan = saap.search(random_scores(discover(model)), 0.3, target="llama.cpp")
    plan.save(tmp_path / "plan")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 400)
    common = ("prune", tmp_path / "dense", "--plan", tmp_path / "plan", "--out", tmp_path / "out", *doing)
    bias = ("--compensate", "bias", "--data", tmp_path / "text.txt", *CALIBRATION)
    told = refused(run(*common, *bias, code=2))
    assert "compensate='bias' contradicts target='llama.cpp', which takes a qwen3 without biases" in told
    assert not (tmp_path / "out").exists()
    run(*common, *bias, "--for", "vllm")  # the plan is then for that
    older = replace(plan, settings={key: value for key, value in plan.settings.items() if key != "target"})
    older.save(tmp_path / "plan")
    run(*common, *bias, "--force")


def test_a_plan_of_a_compensated_model_does_not_stand_for_biases_that_nobody_adds() -> None:
    model = wide_model("qwen3")
    plan = saap.search(random_scores(discover(model)), 0.3, target="llama.cpp")
    made = saap.compact(model, replace(plan, settings=plan.settings | {"compensate": "bias"}), copy=True)
    assert not [name for name, _ in made.named_parameters() if name.endswith("down_proj.bias")]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--for", "tpu"), "target must be one of transformers, vllm, llama.cpp, edge, gpu; got 'tpu'"),
        (("--for", "llama.cpp", "--multiple", 8), "multiple=8 contradicts target='llama.cpp'"),
        (("--for", "vllm", "--allow-empty"), "allow_empty=True contradicts target='vllm'"),
        (("--for", "gpu", "--protect", "-1"), "layer 2: target='gpu' does not take 597 channels of a protected layer"),
        (("--for", "edge", "--ratio", 0.05), "target='edge' alone removes"),
        (("--for", "edge", "--ratio", 0.95), "the largest reachable ratio with these constraints is 0."),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(place, tmp_path, options: tuple, told: str) -> None:
    out = ("--out", tmp_path / "out")
    ratio = () if "--ratio" in options else ("--ratio", 0.3)
    for more in ((), ("--dry-run",)):
        assert told in refused(prune(place, *ratio, *options, *out, *more, code=2))
    assert told in refused(run("plan", place / "s.safetensors", *ratio, *options, *out, code=2))
    assert not (tmp_path / "out").exists()


def test_a_family_that_a_target_does_not_take_is_told_what_does(tmp_path) -> None:
    saap.save(wide_model("gemma2").to(torch.float32), tmp_path / "dense", tokenizer=tiny_tokenizer())
    (tmp_path / "text.txt").write_text("the quick brown fox. " * 200)
    told = refused(prune(tmp_path, "--ratio", 0.3, "--for", "llama.cpp", "--out", tmp_path / "out", code=2))
    assert "target='llama.cpp' takes llama, mistral, qwen2, qwen3, got gemma2: use target transformers or vllm" in told
