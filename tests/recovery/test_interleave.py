"""Recovery between the steps of pruning: one budget of tokens, better models, and what is refused first."""

import json
import sys

import pytest
import torch

import saap
from saap.recovery import interleave
from saap.recovery.training_loop import RecoveryTrainer
from saap.steps import Recipe, prune_in_steps
from tests.recovery.test_recover import ids
from tests.saap.command_line import run
from tests.saap.test_card import card
from tests.saap.test_cli import prune, workplace  # noqa: F401
from tests.saap.tiny import tiny_model

CALIBRATION = {"samples": 4, "seq_len": 16}
TOKENS = 2 * 8 * 16 * 3  # three batches of 8 sequences of 16 tokens after each of two steps


def recipe(steps: int = 2, tokens: int | None = TOKENS, **changes) -> Recipe:
    calibration = CALIBRATION | changes.pop("calibration", {})
    options = {"multiple": 1, "ratio_of": "blocks"}
    return Recipe(search=options, calibration=calibration, steps=steps, recover_tokens=tokens, **changes)


def pruned(made: Recipe, model=None, data=None, **options):
    model = tiny_model("llama", torch.float32) if model is None else model
    return prune_in_steps(model, None, ids(48) if data is None else data, 0.4, made, **options)


@pytest.mark.parametrize("steps", [1, 2])
def test_what_each_step_leaves_is_tuned_after_the_dense_model(monkeypatch, steps: int) -> None:
    tuned = []

    def counted(model, text, held_out, settings, teacher, *rest, **options):
        tuned.append((model.num_parameters(), text.input_ids, settings, teacher.num_parameters()))
        return tune(model, text, held_out, settings, teacher, *rest, **options)

    tune = interleave.tune
    monkeypatch.setattr(interleave, "tune", counted)
    model = tiny_model("llama", torch.float32)
    dense = model.num_parameters()
    done = pruned(recipe(steps), model)
    assert done.model is model and len(tuned) == steps and {each[3] for each in tuned} == {dense}
    assert [each[1].tolist() for each in tuned] == [part.tolist() for part in ids(48)[:48].chunk(steps)]
    for _, _, settings, _ in tuned:
        assert (settings.method, settings.bits, settings.objective) == ("lora", None, "distillation")
        assert settings.tokens == TOKENS // steps and settings.seq_len == 16
    expected = {"recover_tokens": TOKENS, "recover_method": "lora", "recover_objective": "distillation"}
    assert expected.items() <= done.plan.settings.items() and model.saap_plan == done.plan
    assert (
        done.plan.settings["ratio"] == 0.4 and 0.4 <= done.plan.block_ratio < 0.44
    )  # a KV head is 1.6 %, and there are two steps
    assert all(type(module).__module__.split(".")[0] != "peft" for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_tuning_between_steps_brings_the_model_closer_to_the_dense_one() -> None:
    dense, plain = tiny_model("llama", torch.float32), pruned(recipe(tokens=None)).model
    tuned = pruned(recipe()).model

    @torch.no_grad()
    def distance(model) -> float:
        wanted, found = (each(ids(8, seed=3)).logits.log_softmax(-1) for each in (dense, model))
        return float(torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True))

    assert distance(tuned) < 0.9 * distance(plain)  # of 144 sequences in six steps


def test_a_copy_leaves_the_dense_model_alone_and_text_that_is_short_is_repeated(monkeypatch) -> None:
    model, tuned, tune = tiny_model("qwen2", torch.float32), [], interleave.tune

    def noted(model, text, *rest, **options):
        tuned.append(text)
        return tune(model, text, *rest, **options)

    monkeypatch.setattr(interleave, "tune", noted)
    before = model(ids(2)).logits
    done = pruned(recipe(), model, ids(10), copy=True)  # 24 sequences a step of 10
    assert done.model is not model and torch.equal(model(ids(2)).logits, before)
    assert torch.equal(torch.cat([each.input_ids for each in tuned]), ids(10).repeat(5, 1)[:48])


def test_progress_counts_every_stage_and_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    pruned(recipe(compensate="bias"), progress=lambda *counts: seen.append(counts))
    assert {total for _, total in seen} == {2 * 3 * 1000} and seen[-1] == (6000, 6000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_weights_are_not_hashed_where_nothing_can_be_resumed(monkeypatch) -> None:
    hashed: list[object] = []
    monkeypatch.setattr("saap.recovery.fingerprint._hash", lambda tensors: hashed.append(tensors) or "0" * 16)
    assert pruned(recipe()).plan and not hashed
    saap.recover(
        tiny_model("llama", torch.float32), None, ids(), seq_len=16, batch_size=4, rank=2, tokens=64, held_out=0
    )
    assert len(hashed) == 1


@pytest.mark.parametrize("said", ["nan", "interrupt"])
def test_nothing_is_told_of_checkpoints_that_are_gone(monkeypatch, said: str) -> None:
    step = RecoveryTrainer.training_step

    def spoiled(self, *args, **kwargs):
        if said == "interrupt":
            raise KeyboardInterrupt
        return step(self, *args, **kwargs) * float("nan")

    monkeypatch.setattr(RecoveryTrainer, "training_step", spoiled)
    with pytest.raises((RuntimeError, KeyboardInterrupt)) as error:
        pruned(recipe())
    assert str(error.value) == ("training stopped: the loss of step 1 is nan" if said == "nan" else "")


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (0, {}, "recover_tokens must be a positive integer; got 0"),
        (True, {}, "recover_tokens must be a positive integer; got True"),
        (255, {}, "expected at least 256, a batch of 8 sequences of 16 tokens after each of 2 steps; got 255"),
        (TOKENS, {"step_samples": 2}, "step_samples keeps the statistics of the steps before"),
    ],
)
def test_budgets_that_cannot_be_shared_are_refused(tokens, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(tokens=tokens, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": True}, "expected one that is not streamed"),
        ({"seq_len": 65}, "at most the 64 positions of the model, got 65"),
    ],
)
def test_models_that_cannot_be_tuned_are_refused_before_anything_is_done(options: dict, message: str) -> None:
    model = tiny_model("llama", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = CALIBRATION | {"recover_tokens": 20000} | options
    with pytest.raises(ValueError, match=message):
        saap.prune(model, None, ids(70, 32), ratio=0.2, multiple=1, eval_text=ids(2), **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_text_and_packages_are_needed_before_anything_is_done(monkeypatch) -> None:
    model = tiny_model("llama", torch.float32)
    statistics = saap.calibrate(model, data=ids(4), **CALIBRATION)
    with pytest.raises(ValueError, match="recover_tokens tunes the model on text: expected data, got none"):
        saap.prune(model, ratio=0.2, multiple=1, statistics=statistics, recover_tokens=TOKENS, **CALIBRATION)
    monkeypatch.setattr(sys.modules["saap.recovery.recover"], "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="needs accelerate and peft: pip install"):
        recipe()


def test_the_command_says_in_plan_and_card_what_was_tuned(workplace, tmp_path) -> None:  # noqa: F811
    prune(workplace, "--ratio", 0.3, "--steps", 2, "--recover-tokens", TOKENS, "--out", tmp_path / "out")
    settings = json.loads((tmp_path / "out/saap_plan.json").read_text())["settings"]
    assert settings["recover_tokens"] == TOKENS and settings["steps"] == 2
    assert f"recover_tokens {TOKENS}" in card(tmp_path / "out").text
    assert "recover" in (tmp_path / "out/saap_report.html").read_text()
    text = ("--data", workplace / "text.txt", "--out", tmp_path / "other", "--recover-tokens", 4096)
    refused = run("prune", workplace / "dense", "--plan", tmp_path / "out/saap_plan.json", *text, code=2)
    assert "saap recover tunes" in refused.stderr.replace("\n", " ")
    little = prune(workplace, "--ratio", 0.3, "--recover-tokens", 100, "--out", tmp_path / "other", code=2)
    assert "expected at least 128" in little.stderr and not (tmp_path / "other").exists()
