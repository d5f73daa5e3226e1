"""Training in two processes that torchrun starts, against the same training in one."""

import json
import subprocess
import sys

import pytest
import torch

from saap.recovery.trainer import train
from saap.recovery.training_folder import learned
from tests.recovery.processes_case import a_teacher
from tests.recovery.training_cases import learner, some_settings, some_text

# fp32: a step's loss is the sum of two parts in another order, and 12 steps of Adam carry that on
CLOSE = {"rtol": 2e-4, "atol": 0}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{case: [what process 0 found, what process 1 found]}."""
    directory = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.recovery.processes_case", directory], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    names = {file.name.rpartition("-")[0] for file in directory.glob("*.json")}
    results = {
        name: [json.loads((directory / f"{name}-{rank}.json").read_text()) for rank in range(2)] for name in names
    }
    return {**results, "printed": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    model = learner()
    folder = tmp_path_factory.mktemp("alone") / "run"
    history = train(model, some_text(), some_text(7, 1), some_settings(), folder=folder)
    return history, {name: float(tensor.double().abs().sum()) for name, tensor in learned(model).items()}


def same(results, history, sums):
    for result in results:
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(history.losses), **CLOSE)
        evaluations = [[each.step, each.loss] for each in history.evaluations]
        torch.testing.assert_close(torch.tensor(result["evaluations"]), torch.tensor(evaluations), **CLOSE)
        assert result["best"] == history.best
        for name, total in sums.items():
            assert result["sums"][name] == pytest.approx(total, rel=1e-4), name
    assert results[0]["losses"] == results[1]["losses"] and results[0]["sums"] == results[1]["sums"]


@pytest.mark.parametrize("case", ["micro_batches", "unused", "resumed", "fsdp2"])
def test_two_processes_train_as_one_does(found, alone, case):
    same(found[case], *alone)


def test_a_resumed_training_has_the_losses_of_a_straight_one(found):
    assert found["resumed"][0]["losses"] == found["unused"][0]["losses"]  # which differ in what gets no gradient alone
    assert found["fsdp2"][0]["again"]["losses"] == found["fsdp2"][0]["losses"]


def test_distillation_in_a_group_that_was_joined_before(found, tmp_path):
    settings = some_settings(hidden=0.1)
    history = train(learner(), some_text(), None, settings, folder=tmp_path / "run", teacher=a_teacher())
    for result in (*found["several_in_one_group"], *(each["distilled"] for each in found["fsdp2"])):
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(history.losses), **CLOSE)


def test_no_thread_of_a_group_outlives_its_training(found):
    """One that did could abort the process when the interpreter ends, after all work was done."""
    assert found["left"][0][1][0]  # the first process hears of its progress
    for losses, _, after in found["left"]:
        assert losses and not after


def test_mixtures_of_experts_train(found):
    first, second = found["mixture"]
    assert first["losses"] == second["losses"] and len(first["losses"]) == 4


def test_processes_that_disagree_all_say_so_before_anything_is_written(found):
    for errors in found["disagreeing"]:
        text, rate, weights, batch, folder, files = errors
        assert text.startswith("ValueError: the processes were not started for the same work; text: '")
        assert " in process 0, '" in text and text.endswith(" in process 1")
        assert rate.endswith("setting learning_rate: 0.1 in process 0, 1.1 in process 1")
        assert "; frozen_weights: '" in weights
        assert batch.startswith("ValueError: expected a batch_size that 2 processes")
        assert folder.startswith("FileExistsError: ") and files == ["mine.txt"]


def test_faults_of_one_process_stop_all(found):
    for nan, disk, finished in found["faults"]:
        assert "the loss of step" in nan and " is nan; the last good checkpoint is " in nan
        assert "cannot write the checkpoint of step 8" in disk and "No space left" in disk and "checkpoint-4" in disk
        assert f"makes the model from step {finished['best']} without" in nan and finished["best"] > 0
        assert len(finished["losses"]) == finished["best"] and finished == found["faults"][0][2]


def test_fsdp_shards_a_copy_and_writes_whole_checkpoints(found):
    for result in found["fsdp2"]:
        first, second = result["without"]
        assert "launch with --fsdp_version 2" in first and "launch without --use_fsdp" in second
        assert result["whole"] == "Parameter"
        assert result["kept"] == sorted(
            ["learned.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"]
            + ["settings.json", "trainer_state.json"]
        )


def test_nothing_is_printed(found):
    lines = [line for line in found["printed"].splitlines() if "OMP_NUM_THREADS" not in line]
    assert not [line for line in lines if line.strip(" *")]
