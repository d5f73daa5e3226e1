"""Training that goes on after a kill with the same losses, and the resumes that are refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from saap.recovery import training_folder
from saap.recovery.fingerprint import weights_fingerprint
from saap.recovery.trainer import train
from saap.recovery.training_folder import differences, learned
from saap.recovery.training_loop import RecoveryTrainer
from tests.recovery.training_cases import learner, some_settings, some_text
from tests.saap.tiny import tiny_model


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A directory of trainings that were killed."""
    directory = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.recovery.killed_runs", directory], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return directory


def same(one, other, one_model, other_model) -> None:
    assert one.losses == other.losses and one.evaluations == other.evaluations
    assert (one.best, one.stopped_early, one.tokens) == (other.best, other.stopped_early, other.tokens)
    for name, tensor in learned(one_model).items():
        assert torch.equal(tensor, learned(other_model)[name]), name


@pytest.mark.parametrize("name, micro_batch", [("after_seven", None), ("after_seven_by_ones", 1)])
def test_a_killed_training_goes_on_with_the_same_losses_bit_for_bit(tmp_path, killed, name, micro_batch):
    settings = some_settings(micro_batch=micro_batch)
    straight, resumed, heard = learner(), learner(), []
    wanted = train(straight, some_text(), some_text(6, 1), settings, folder=tmp_path / "straight")
    assert training_folder.last_checkpoint(killed / name).name == "checkpoint-4"
    found = train(
        resumed, some_text(), some_text(6, 1), settings, folder=killed / name, resume=True,
        said=lambda step, loss: heard.append(step), progress=lambda done, total: heard.append((done, total)),
    )  # fmt: skip
    assert heard[:3] == [(4, 12), (5, 12), 5] and heard[-1] == 12  # it went on, and did not start again
    same(found, wanted, resumed, straight)
    for file in ("learned.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        both = [(run / "checkpoint-12" / file).read_bytes() for run in (tmp_path / "straight", killed / name)]
        assert both[0] == both[1], file


def test_dropout_goes_on_where_it_was(tmp_path):
    def model():
        return learner("opt", dropout=0.3, ffn_dim=40)

    wanted = train(model(), some_text(), None, some_settings(), folder=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train(model(), some_text(), None, some_settings(), folder=tmp_path / "run", said=_interrupt_at_6)
    found = train(model(), some_text(), None, some_settings(), folder=tmp_path / "run", resume=True)
    assert found.losses == wanted.losses


def _interrupt_at_6(step, loss):
    if step == 6:
        raise KeyboardInterrupt


def test_peft_models_go_on(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)
        return peft.get_peft_model(tiny_model("llama", dtype=torch.float32, num_hidden_layers=2), config)

    settings = some_settings(method="lora")
    wanted = train(model(), some_text(), None, settings, folder=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train(model(), some_text(), None, settings, folder=tmp_path / "run", said=_interrupt_at_6)
    assert train(model(), some_text(), None, settings, folder=tmp_path / "run", resume=True).losses == wanted.losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    model, folder = learner(), tmp_path_factory.mktemp("straight") / "run"
    return train(model, some_text(), some_text(6, 1), some_settings(), folder=folder), model


@pytest.mark.parametrize(
    "name, last",
    [
        ("writing_parameters", 4), ("writing_states", 4), ("before_the_name", 4), ("removing_the_old", 8),
        ("before_the_first", None), ("no_more_bytes", 4),
    ],
)  # fmt: skip
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(killed, straight, name, last):
    folder, model = killed / name, learner()
    found = training_folder.last_checkpoint(folder)
    assert (found and found.name) == (last and f"checkpoint-{last}")
    assert (folder / training_folder.UNFINISHED).is_dir() == (name != "no_more_bytes")
    history = train(model, some_text(), some_text(6, 1), some_settings(), folder=folder, resume=True)
    same(history, straight[0], model, straight[1])
    assert not (folder / training_folder.UNFINISHED).exists()
    again = train(model, some_text(), some_text(6, 1), some_settings(), folder=folder, resume=True)
    assert again == history  # it is finished


def test_a_file_system_that_takes_no_more_bytes_is_named(killed):
    said = (killed / "no_more_bytes.txt").read_text()
    assert f"cannot write the checkpoint of step 8 in {killed / 'no_more_bytes'}: " in said
    assert said.endswith("; checkpoint-4 is whole and stays")


def test_a_training_that_stopped_early_is_not_trained_further(tmp_path, monkeypatch):
    settings = some_settings(epochs=20, patience=2, learning_rate=3.0)
    wanted = train(learner(), some_text(), some_text(6, 1), settings, folder=tmp_path / "run")
    assert wanted.stopped_early
    monkeypatch.setattr(RecoveryTrainer, "train", None)
    model = learner()
    found = train(model, some_text(), some_text(6, 1), settings, folder=tmp_path / "run", resume=True)
    assert found == wanted
    best = load_file(tmp_path / "run" / f"checkpoint-{wanted.best}" / "learned.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in learned(model).items())


def interrupted(folder, **changes):
    with pytest.raises(KeyboardInterrupt):
        train(
            learner(), some_text(), some_text(6, 1), some_settings(**changes), folder=folder, said=_interrupt_at_6,
            teacher=tiny_model("llama", dtype=torch.float32),
        )  # fmt: skip


def test_a_resume_of_another_training_is_refused_with_the_differences(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    interrupted(folder)
    monkeypatch.setattr(RecoveryTrainer, "train", None)  # nothing is trained
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    teacher, text, held_out = tiny_model("llama", dtype=torch.float32), some_text(), some_text(6, 1)

    def refused(wanted, model=None, text=text, held_out=held_out, settings=None, teacher=teacher):
        with pytest.raises(ValueError, match=wanted):
            train(
                model or learner(), text, held_out, settings or some_settings(), folder=folder, resume=True,
                teacher=teacher,
            )  # fmt: skip

    refused(
        r"was another one: settings.epochs: 2.4 -> 3.0; settings.learning_rate: 0.01 -> 0.02$",
        settings=some_settings(learning_rate=0.02, epochs=3.0),
    )
    refused(r"text: [0-9a-f]{16} -> [0-9a-f]{16}$", text=some_text(seed=5))
    refused(r"held_out_text: [0-9a-f]{16} -> None$", held_out=None)
    refused(r"teacher: [0-9a-f]{16} -> [0-9a-f]{16}$", teacher=tiny_model("llama", dtype=torch.float32, seed=4))
    other = learner()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 4] += 1e-6
    refused(r"frozen_weights: [0-9a-f]{16} -> [0-9a-f]{16}$", model=other)
    more = learner()
    more.lm_head.weight.requires_grad_()
    refused(r"learns.lm_head.weight: nothing -> \[64, 64\]", model=more)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_damaged_settings_file_is_named(tmp_path):
    folder = tmp_path / "run"
    interrupted(folder)
    (folder / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json: not valid JSON"):
        train(learner(), some_text(), None, some_settings(), folder=folder, resume=True)


def test_differences_are_listed_by_name():
    old, new = {"a": {"b": 1, "c": [2]}, "d": 3}, {"a": {"b": 4, "c": [2]}, "e": None}
    assert differences(old, new) == ["a.b: 1 -> 4", "d: 3 -> nothing", "e: nothing -> None"]
    assert not differences(old, json.loads(json.dumps(old)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprints_see_every_bit_and_no_alignment(dtype):
    model = torch.nn.Linear(7, 9, dtype=dtype)
    found = weights_fingerprint(model)
    apart = torch.nn.Linear(7, 9, dtype=dtype)
    storage = torch.zeros(64, dtype=dtype)
    storage[1:].copy_(model.weight.detach().flatten())
    apart.weight = torch.nn.Parameter(storage[1:].view(9, 7))
    apart.bias = torch.nn.Parameter(model.bias.detach().clone())
    assert weights_fingerprint(apart) == found
    with torch.no_grad():
        apart.weight[[2, 3]] = apart.weight[[3, 2]]
    assert weights_fingerprint(apart) != found
    with torch.no_grad():
        apart.weight[[2, 3]] = apart.weight[[3, 2]]
        apart.bias[8] *= -1
    assert weights_fingerprint(apart) != found
