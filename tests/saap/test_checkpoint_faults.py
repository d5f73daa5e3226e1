"""What saving and loading refuse, and what a failed or killed save leaves behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from saap.checkpoint import load, save
from saap.compact import compact
from tests.saap.test_checkpoint import ids, make_plan
from tests.saap.tiny import tiny_model


def test_a_plan_of_another_model_changes_nothing() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    before = model(ids()).logits
    with pytest.raises(ValueError, match="this plan was made for a llama model with fingerprint"):
        compact(model, make_plan(other))
    assert torch.equal(model(ids()).logits, before)


def test_existing_output_is_refused_and_replaced_only_by_force(tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="out exists already; use force"):
        save(model, tmp_path / "out")
    assert (tmp_path / "out/precious.txt").read_text() == "kept"
    save(model, tmp_path / "out", force=True)
    assert load(tmp_path / "out").dtype == torch.float32 and not (tmp_path / "out/precious.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; expected a directory"):
        save(model, tmp_path / "file", force=True)


def test_a_failing_save_leaves_nothing(tmp_path, monkeypatch) -> None:
    model = tiny_model("llama", torch.float32)
    monkeypatch.setattr("saap.checkpoint.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch, saap.checkpoint
from tests.saap.tiny import tiny_model
def stall(*_):
    print("stalled", flush=True)
    time.sleep(60)
saap.checkpoint.model_card = stall
saap.checkpoint.save(tiny_model("llama", torch.float32), sys.argv[1], force=True)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_killed_while_saving_leaves_the_old_or_nothing(tmp_path, existing: bool) -> None:
    target = tmp_path / "out"
    model = tiny_model("llama", torch.float32, seed=5)
    if existing:
        save(model, target)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target), str(Path(__file__).parents[2])], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "stalled"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    if existing:
        assert torch.equal(load(target)(ids()).logits, model(ids()).logits)
    else:
        assert not target.exists()
    save(model, target, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the next save clears what was left


def test_truncated_weights_and_missing_files_are_named(tmp_path) -> None:
    save(tiny_model("llama", torch.float32), tmp_path / "out")
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        load(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a model directory with config.json, found none in"):
        load(tmp_path / "empty")
