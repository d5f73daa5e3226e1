"""A training that stopped on its way is finished from its checkpoints, without training on."""

import json

import pytest
import torch
from safetensors.torch import load_file

import saap
from saap.recovery.history import History
from saap.recovery.trainer import train
from saap.recovery.training_folder import learned
from saap.recovery.training_loop import RecoveryTrainer
from tests.recovery.test_cli_recover import recover, workplace  # noqa: F401
from tests.recovery.test_recover import ids, pruned, recovered
from tests.recovery.training_cases import learner, some_settings, some_text
from tests.saap.test_card import card

pytestmark = pytest.mark.filterwarnings("ignore:.* held out, fewer")  # of so few sequences


def nan_at(monkeypatch, last: int) -> None:
    """Every training meets a loss that is none in the step after the ``last``."""
    step = RecoveryTrainer.training_step

    def spoiled(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == last else loss

    monkeypatch.setattr(RecoveryTrainer, "training_step", spoiled)


def stopped(folder, held_out=True, **changes) -> str:
    """What is said of a training that meets a NaN."""
    with pytest.raises(RuntimeError) as error:
        train(learner(), some_text(), some_text(6, 1) if held_out else None, some_settings(**changes), folder=folder)
    return str(error.value)


def finished(folder, held_out=True, **changes) -> tuple[History, dict[str, torch.Tensor]]:
    model, held = learner(), some_text(6, 1) if held_out else None
    history = train(model, some_text(), held, some_settings(**changes), folder=folder, finish=True)
    return history, learned(model)


def test_the_best_step_before_a_nan_is_taken_without_training(tmp_path, monkeypatch) -> None:
    nan_at(monkeypatch, 10)
    options = {"learning_rate": 0.3, "warmup": 0.0, "patience": None, "evaluate_every": 2}  # gets worse on the way
    said = stopped(tmp_path / "run", **options)
    monkeypatch.setattr(RecoveryTrainer, "train", None)  # nothing is trained
    history, found = finished(tmp_path / "run", **options)
    losses = {each.step: each.loss for each in history.evaluations}
    assert history.best == min(losses, key=losses.__getitem__) < 10 and list(losses) == [0, 2, 4, 6, 8, 10]
    assert said.endswith(
        f"the last good checkpoint is {tmp_path}/run/checkpoint-10. A resume would meet the same: finish (--finish), "
        f"with all else as it was, makes the model from step {history.best} without training on"
    )
    assert (len(history.losses), history.planned, history.cut_short, history.stopped_early) == (10, 12, True, False)
    kept = load_file(tmp_path / "run" / f"checkpoint-{history.best}" / "learned.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in found.items())


def test_the_last_step_is_taken_without_held_out_text(tmp_path, monkeypatch) -> None:
    nan_at(monkeypatch, 9)
    assert "makes the model from step 8 without training on" in stopped(tmp_path / "run", held_out=False)
    history, found = finished(tmp_path / "run", held_out=False)
    kept = load_file(tmp_path / "run/checkpoint-8/learned.safetensors")
    assert history.best == 8 and all(torch.equal(tensor, kept[name]) for name, tensor in found.items())


def test_a_training_that_came_to_its_end_is_finished_as_it_was(tmp_path) -> None:
    wanted = train(learner(), some_text(), some_text(6, 1), some_settings(), folder=tmp_path / "run")
    assert finished(tmp_path / "run")[0] == wanted and not wanted.cut_short


def test_there_must_be_a_checkpoint_of_the_same_training(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="no training to resume in"):
        finished(tmp_path / "none")
    nan_at(monkeypatch, 6)
    stopped(tmp_path / "run")
    with pytest.raises(ValueError, match="settings.seed: 0 -> 1"):
        finished(tmp_path / "run", seed=1)
    (tmp_path / "run/checkpoint-4").rename(tmp_path / "elsewhere")
    for each in (tmp_path / "run").glob("checkpoint-*"):
        each.rename(tmp_path / each.name)
    with pytest.raises(FileNotFoundError, match="no checkpoint to finish from in .*run: go on with resume"):
        finished(tmp_path / "run")
    with pytest.raises(ValueError, match="expected folder, got none"):
        recovered(finish=True)


def test_a_model_is_recovered_as_far_as_its_training_came(tmp_path, monkeypatch) -> None:
    straight, stages = recovered(folder=tmp_path / "straight", evaluate_every=4, held_out=0), []
    nan_at(monkeypatch, 9)
    with pytest.raises(RuntimeError, match="makes the model from step 8"):
        recovered(folder=tmp_path / "run", evaluate_every=4, held_out=0)
    found = recovered(folder=tmp_path / "run", evaluate_every=4, held_out=0, finish=True, stage=stages.append)
    assert stages == ["quantising"] and found.history.losses == straight.history.losses[:8]
    assert found.model.is_quantized and torch.isfinite(found.model(ids(2)).logits).all()
    assert not torch.equal(found.model(ids(2)).logits, saap.quantise(pruned(), bits=4)(ids(2)).logits)


def test_the_command_that_the_error_names_writes_the_directory(workplace, tmp_path, monkeypatch) -> None:  # noqa: F811
    nan_at(monkeypatch, 5)
    options = ("--out", tmp_path / "out", "--evaluate-every", 2, "--epochs", 2)
    for again in ((), ("--resume",)):
        refused = recover(workplace, *options, *again, code=2)
        assert "the loss of step 6 is nan" in refused.stderr and "finish (--finish)" in refused.stderr
    dry = json.loads(recover(workplace, *options, "--finish", "--dry-run", "--json").stdout)
    assert dry["finishes_from"] == "checkpoint-4" and not (tmp_path / "out").exists()
    found = json.loads(recover(workplace, *options, "--finish", "--json").stdout)
    planned = found["planned_steps"]
    assert (found["steps"], found["cut_short"], found["stopped_early"]) == (4, True, False) and planned > 6
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"] and saap.load(tmp_path / "out").is_quantized
    text = card(tmp_path / "out").text
    assert f"| stopped | after step 4 of {planned}, and finished from its checkpoint |" in text
    assert "steps planned" in (tmp_path / "out/saap_report.html").read_text()
    refused = recover(workplace, "--out", tmp_path / "new", "--finish", code=2)
    assert "no training to go on from" in refused.stderr
