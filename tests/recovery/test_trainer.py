"""Training: its steps against a loop written out, its checkpoints, its end, and what stops it."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from saap.recovery import trainer, training_folder
from saap.recovery.history import Evaluated, best_step, out_of_patience
from saap.recovery.schedule import Schedule, order_of, rise_and_fall
from saap.recovery.settings import LEARNING_RATES, Settings, default_learning_rate
from saap.recovery.trainer import train
from saap.recovery.training_folder import learned
from saap.recovery.training_loop import RecoveryTrainer
from tests.recovery.training_cases import SEQ_LEN, learner, some_settings, some_text
from tests.saap.tiny import tiny_model


def held_out_loss(model, text) -> float:
    with torch.no_grad():
        logits = model(text.input_ids).logits[:, :-1].double().flatten(0, 1)
    return float(F.cross_entropy(logits, text.labels[:, 1:].flatten()))


def written_out(model, text, settings, steps):
    """Steps of AdamW with torch alone; the loss of each."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    order, losses = order_of(len(text), steps * settings.batch_size, settings.seed), []
    warmup = math.ceil(settings.warmup * steps)
    for step in range(steps):
        rows = order[step * settings.batch_size : (step + 1) * settings.batch_size]
        logits = model(text.input_ids[rows]).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, text.labels[rows][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        share = (
            (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        )
        optimizer.param_groups[0]["lr"] = settings.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("micro_batch", [None, 2, 1])
def test_steps_are_those_of_a_loop_written_out_whatever_the_micro_batch(tmp_path, micro_batch):
    text, settings = some_text(), some_settings(micro_batch=micro_batch, patience=None)
    mine, theirs = learner(), learner().train()
    wanted = written_out(theirs, text, settings, 12)
    history = train(mine, text, None, settings, folder=tmp_path / "run")
    # fp32: micro-batches of unequal tokens are summed in another order; the difference grows over 12 steps of Adam
    torch.testing.assert_close(torch.tensor(history.losses), torch.tensor(wanted), rtol=2e-4, atol=0)
    for name, parameter in learned(mine).items():
        torch.testing.assert_close(parameter, learned(theirs)[name], rtol=0, atol=2e-4, msg=name)  # 2 % of a step
    frozen = {name for name, parameter in mine.named_parameters() if not parameter.requires_grad}
    assert all(torch.equal(mine.get_parameter(name), learner().get_parameter(name)) for name in frozen)
    assert history.best == 12 and not history.stopped_early and history.tokens == 12 * 4 * SEQ_LEN
    assert not mine.training and all(parameter.grad is None for parameter in mine.parameters())


def test_distillation_and_gradient_checkpointing_change_no_loss(tmp_path):
    teacher = tiny_model("llama", dtype=torch.float32, num_hidden_layers=2, seed=5).train()
    runs = []
    for checkpointing in (False, True):
        model = learner()
        settings = some_settings(gradient_checkpointing=checkpointing, top_k=8, next_token=0.1, hidden=0.1, epochs=1)
        folder = tmp_path / str(checkpointing)
        runs.append((train(model, some_text(), None, settings, folder=folder, teacher=teacher), model))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert not model.get_input_embeddings()._forward_hooks
    assert runs[0][0].losses == runs[1][0].losses  # the same products, made twice
    assert runs[0][0].losses[-1] < runs[0][0].losses[0]
    plain = train(learner(), some_text(), None, some_settings(epochs=1), folder=tmp_path / "plain")
    assert plain.losses[0] != runs[0][0].losses[0] and not teacher.training
    without = some_settings(epochs=1, objective="next_token")
    assert train(learner(), some_text(), None, without, folder=tmp_path / "w", teacher=teacher).losses == plain.losses


def test_evaluations_are_token_weighted_and_the_best_is_taken(tmp_path):
    model, held_out = learner(), some_text(7, seed=9)
    before = held_out_loss(model, held_out)
    history = train(model, some_text(), held_out, some_settings(epochs=6), folder=tmp_path / "run")
    assert [each.step for each in history.evaluations][:4] == [0, 4, 8, 12]
    assert history.evaluations[0].loss == pytest.approx(before, rel=1e-6)  # fp32 logits
    assert history.best == min(history.evaluations, key=lambda each: each.loss).step
    lowest = min(each.loss for each in history.evaluations)
    assert held_out_loss(model, held_out) == pytest.approx(lowest, rel=1e-6)


def test_training_that_only_harms_ends_early_with_the_model_as_it_came(tmp_path):
    model, text = learner(), some_text(6, 1)
    with torch.no_grad():
        text.labels[:, 1:] = model(text.input_ids).logits[:, :-1].argmax(-1)  # what it predicts as it came
    history = train(model, some_text(), text, some_settings(epochs=20, patience=2), folder=tmp_path / "run")
    assert history.stopped_early and history.best == 0 and len(history.losses) == 8
    assert [each.step for each in history.evaluations] == [0, 4, 8]
    assert all(torch.equal(tensor, learned(learner())[name]) for name, tensor in learned(model).items())


def test_checkpoints_hold_what_learns_alone_and_two_are_kept(tmp_path):
    model = learner()
    train(model, some_text(), some_text(6, 1), some_settings(epochs=6), folder=tmp_path / "run")
    kept = sorted(each.name for each in (tmp_path / "run").iterdir())
    assert len(kept) in (2, 3) and "checkpoint-30" in kept and "settings.json" in kept
    found = load_file(tmp_path / "run" / "checkpoint-30" / "learned.safetensors")
    assert found.keys() == learned(model).keys()
    numbers = sum(tensor.numel() for tensor in found.values())
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoint-30").iterdir())
    assert size < 3 * 4 * numbers + 60_000  # parameters and two moments; 60 kB of state, names and pickle
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]["batch_size"] == 4


def test_peft_models_train_by_their_own_names(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=2)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    settings = some_settings(method="lora", gradient_checkpointing=True)
    history = train(wrapped, some_text(), some_text(6, 1), settings, folder=tmp_path / "run")
    assert history.losses[-1] < history.losses[0]
    saved = load_file(tmp_path / "run" / "checkpoint-12" / "learned.safetensors")
    assert saved.keys() == learned(wrapped).keys() and all("lora_" in name for name in saved)


def test_callbacks_hear_every_step_and_nothing_is_printed(tmp_path):
    script = (
        "from tests.recovery.training_cases import *\nfrom saap.recovery.trainer import train\nimport saap, sys\n"
        "assert not {'saap.recovery.training_loop', 'transformers.trainer'} & sys.modules.keys()\n"  # need accelerate
        "heard = []\n"
        "h = train(learner(), some_text(), some_text(6, 1), some_settings(), folder=sys.argv[1],\n"
        "    progress=lambda done, total: heard.append((done, total)), said=lambda *each: heard.append(each))\n"
        "assert heard == [(0, 12), *(e for s in range(12) for e in ((s + 1, 12), (s + 1, h.losses[s])))], heard\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_training_without_accelerate_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=re.escape("training needs accelerate: pip install 'saap[recover]'")):
        train(learner(), some_text(), None, some_settings(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_steps_by_epochs_and_tokens():
    assert Schedule.of(some_settings(epochs=1.0, evaluate_every=None), 101, 1) == Schedule(26, 4, 1, 3)
    assert Schedule.of(some_settings(tokens=500), 101, 2).steps == 500 // (4 * SEQ_LEN)
    assert Schedule.of(some_settings(tokens=10**9, micro_batch=1), 10, 2) == Schedule(6, 1, 2, 4)
    with pytest.raises(ValueError, match="at least those of one step, 4 x 12 = 48, got 47"):
        Schedule.of(some_settings(tokens=47), 10, 1)
    with pytest.raises(ValueError, match="batch_size that 3 processes with micro-batches of any size divide, got 4"):
        Schedule.of(some_settings(), 10, 3)
    with pytest.raises(ValueError, match="2 processes with micro-batches of 4 divide, got 4"):
        Schedule.of(some_settings(micro_batch=4), 10, 2)


def test_order_of_sequences_and_shares_of_the_rate():
    order = order_of(5, 13, seed=3)
    assert len(order) == 13 and sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order == order_of(5, 13, seed=3) and order != order_of(5, 13, seed=4) and order[:5] != order[5:10]
    share = rise_and_fall(2, 10)
    assert [share(0), share(1), share(2)] == [0.5, 1.0, 1.0] and share(6) == pytest.approx(0.5)
    assert 0 < share(9) < 0.05 and rise_and_fall(0, 1)(0) == 1.0


def test_patience_and_the_best():
    log = [{"step": step, "eval_loss": loss} for step, loss in ((0, 3.0), (2, 2.0), (4, 2.0), (6, 2.5))]
    assert best_step(log, 9) == 2 and best_step([{"loss": 1.0, "step": 1}], 9) == 9
    assert out_of_patience(log, 2) and not out_of_patience(log, 3) and not out_of_patience(log, None)
    assert not out_of_patience([], 1) and Evaluated(2, 2.0) == Evaluated(2, 2.0)


def test_a_loss_that_is_none_stops_at_once_and_keeps_the_last_good_checkpoint(tmp_path):
    folder, heard = tmp_path / "run", []
    model, text, held_out = learner(), some_text(), some_text(6, 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("nan")
    for each in (text.input_ids, held_out.input_ids):
        each.clamp_(max=62)
    text.input_ids[order_of(20, 20, seed=0)[4 * 3], 3] = 63  # in the fourth step
    wanted = rf"stopped: the loss of step 4 is nan; the last good checkpoint is {folder}/checkpoint-2\. A resume would"
    with pytest.raises(RuntimeError, match=wanted):
        train(
            model, text, held_out, some_settings(epochs=1, evaluate_every=2), folder=folder,
            said=lambda step, loss: heard.append(step),
        )  # fmt: skip
    assert heard == [1, 2, 3]
    kept = load_file(folder / "checkpoint-2" / "learned.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert training_folder.last_checkpoint(folder).name == "checkpoint-2"


def test_parameters_that_are_none_are_not_kept(tmp_path, monkeypatch):
    step = RecoveryTrainer.training_step

    def overflows(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 3:  # what the fourth step leaves behind, unseen by its loss and its gradient
            with torch.no_grad():
                self.objective.model.model.norm.weight[5] = float("inf")
        return loss

    monkeypatch.setattr(RecoveryTrainer, "training_step", overflows)
    with pytest.raises(RuntimeError, match=r"model.norm.weight is not finite after step 4; .*checkpoint-0"):
        train(learner(), some_text(), None, some_settings(), folder=tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"the held-out loss after step 4 is nan; .*checkpoint-0"):
        train(learner(), some_text(), some_text(6, 1), some_settings(), folder=tmp_path / "other")


@pytest.mark.parametrize("how", ["safetensors", "torch"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, how):
    folder = tmp_path / "run"
    save = training_folder.save_file if how == "safetensors" else torch.save
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if any("checkpoint-8" in str(each) for each in args):
            if how == "safetensors":
                raise OSError(28, "No space left on device")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        return save(*args, **kwargs)

    monkeypatch.setattr(*((training_folder, "save_file") if how == "safetensors" else (torch, "save")), full)
    wanted = (
        rf"cannot write the checkpoint of step 8 in {folder}: .*(No space|file write failed).*; checkpoint-4 is whole"
    )
    with pytest.raises(OSError, match=wanted):
        train(learner(), some_text(), None, some_settings(), folder=folder)
    monkeypatch.undo()
    straight = train(learner(), some_text(), None, some_settings(), folder=tmp_path / "straight")
    assert train(learner(), some_text(), None, some_settings(), folder=folder, resume=True).losses == straight.losses


def test_an_interrupt_passes_and_says_how_to_go_on(tmp_path):
    def said(step, loss):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="resume .--resume. goes on from checkpoint-4 in .*run"):
        train(learner(), some_text(), None, some_settings(), folder=tmp_path / "run", said=said)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path):
    frozen, folder = learner().requires_grad_(False), tmp_path / "run"
    with pytest.raises(ValueError, match="nothing learns"):
        train(frozen, some_text(), None, some_settings(), folder=folder)
    with pytest.raises(ValueError, match="expected a teacher, got none"):
        train(learner(), some_text(), None, some_settings(objective="distillation"), folder=folder)
    with pytest.raises(ValueError, match="vocabulary"):
        other = tiny_model("llama", vocab_size=65)
        train(learner(), some_text(), None, some_settings(), folder=folder, teacher=other)
    with pytest.raises(ValueError, match="one step"):
        train(learner(), some_text(), None, some_settings(tokens=3), folder=folder)
    with pytest.raises(FileNotFoundError, match="no training to resume in"):
        train(learner(), some_text(), None, some_settings(), folder=folder, resume=True)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="exists already: resume"):
        train(learner(), some_text(), None, some_settings(), folder=folder)
    assert os.listdir(folder) == ["mine.txt"]


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match="micro_batch: expected a divisor of batch_size 8, got 3"):
        Settings(micro_batch=3)
    assert Settings.from_dict(some_settings().to_dict()) == some_settings()
    with pytest.raises(ValueError, match="unknown recovery settings: colour"):
        Settings.from_dict({"colour": 1})
    for seed in (-1, 1 << 32, 1.0, "1"):
        with pytest.raises(ValueError, match=r"seed: expected an integer from 0 to 2\^32 - 1, got"):
            Settings(seed=seed)
    for name in ("alpha", "warmup", "next_token"):
        with pytest.raises(ValueError, match=f"{name}: expected a number, got '1'"):
            Settings(**{name: "1"})


def test_default_learning_rate_falls_with_the_width():
    assert (
        default_learning_rate("groupwise", 256) == default_learning_rate("groupwise", 64) == LEARNING_RATES["groupwise"]
    )
    assert default_learning_rate("lora", 4096) == pytest.approx(LEARNING_RATES["lora"] / 16)
