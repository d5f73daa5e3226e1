"""Checkpoints that something happened to: what is damaged or missing is named before anything is loaded."""

import shutil
from pathlib import Path

import pytest

from saap.recovery.checked_folder import refuse_damaged
from saap.recovery.training_folder import last_checkpoint
from tests.recovery.test_cli_recover import recover, workplace  # noqa: F401
from tests.recovery.test_recover import ids, recovered

pytestmark = pytest.mark.filterwarnings("ignore:.* held out, fewer")  # of so few sequences

# a rate that makes the model worse than it came
OPTIONS = {"held_out": ids(6, seed=1), "epochs": 2.0, "evaluate_every": 2, "patience": None, "learning_rate": 1.0}
STATES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


def interrupted_in(folder: Path, **changes) -> Path:
    def stop(step: int, loss: float) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(folder=folder, said=stop, **OPTIONS | changes)
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A training whose last checkpoint is that of step 8 and whose best an earlier one."""
    folder = interrupted_in(tmp_path_factory.mktemp("interrupted") / "run")
    assert (folder / "checkpoint-8").is_dir() and (folder / best_of(folder)).is_dir()
    return folder


def best_of(folder: Path) -> str:
    """The name of the checkpoint that is not the last."""
    (best,) = (each.name for each in folder.glob("checkpoint-*") if each.name != "checkpoint-8")
    return best


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    """One bit of the file's first part, which torch begins at byte 64."""
    content = bytearray(file.read_bytes())
    content[80] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, flip, Path.unlink])
@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_not_whole_is_named_with_what_can_be_done(interrupted, tmp_path, name: str, damage) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    damage(folder / "checkpoint-8" / name)
    what = "is missing" if damage is Path.unlink else "is damaged: .*"
    way = f"remove {folder}/checkpoint-8 to go on from {best_of(folder)}"
    end = r", or finish \(--finish\), which does without it$"
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{folder}/checkpoint-8/{name} {what}: {way}{end}"):
        recovered(folder=folder, resume=True, stage=pytest.fail, **OPTIONS)
    found = recovered(folder=folder, finish=True, **OPTIONS)
    assert found.history.cut_short and len(found.history.losses) == 8


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["learned.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("how", ["resume", "finish"])
def test_parameters_and_log_are_needed_to_finish_too(interrupted, tmp_path, name: str, damage, how: str) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    damage(folder / "checkpoint-8" / name)
    wanted = f"^{folder}/checkpoint-8/{name} is .*: remove {folder}/checkpoint-8 to go on from {best_of(folder)}$"
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        recovered(folder=folder, stage=pytest.fail, **OPTIONS, **{how: True})


def test_what_the_error_says_can_be_done(interrupted, tmp_path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-8")
    straight = recovered(**OPTIONS)
    assert recovered(folder=folder, resume=True, **OPTIONS).history.losses == straight.history.losses


def test_without_an_earlier_checkpoint_a_training_starts_again(tmp_path) -> None:
    folder = interrupted_in(tmp_path / "run", held_out=0)
    cut(folder / "checkpoint-8/optimizer.pt")
    with pytest.raises(ValueError, match=f"optimizer.pt is damaged: .*: remove {folder} to start again, or finish"):
        recovered(folder=folder, resume=True, **OPTIONS | {"held_out": 0})


def test_the_best_checkpoint_cannot_be_done_without(interrupted, tmp_path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    cut(folder / best_of(folder) / "learned.safetensors")
    with pytest.raises(
        ValueError, match=f"{best_of(folder)}/learned.safetensors is damaged: .*: remove {folder} to start"
    ):
        recovered(folder=folder, resume=True, **OPTIONS)


@pytest.mark.parametrize("how", ["resume", "finish"])
def test_a_best_checkpoint_that_is_gone_is_missed_before_training(interrupted, tmp_path, how: str) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    best = best_of(folder)
    shutil.rmtree(folder / best)
    message = f"^{folder}/{best}/learned.safetensors is missing: remove {folder} to start again$"
    with pytest.raises(FileNotFoundError, match=message):
        recovered(folder=folder, stage=pytest.fail, **OPTIONS | {how: True})


@pytest.mark.parametrize("log", ["null", "[3]"])
def test_a_log_that_is_none_is_named_once(interrupted, tmp_path, log: str) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    (folder / "checkpoint-8" / "trainer_state.json").write_text(f'{{"log_history": {log}}}')
    message = (
        rf"^{folder}/checkpoint-8/trainer_state.json is damaged: TypeError\(.*\): remove {folder}/checkpoint-8 to go on"
    )
    with pytest.raises(ValueError, match=message):
        recovered(folder=folder, resume=True, stage=pytest.fail, **OPTIONS)


def test_random_numbers_of_several_processes_are_looked_for(interrupted, tmp_path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    state = folder / "checkpoint-8/rng_state.pth"
    for index in range(2):
        shutil.copy(state, state.with_name(f"rng_state_{index}.pth"))
    state.unlink()
    refuse_damaged(folder, states=True)
    for index in range(2):
        kept = state.with_name(f"rng_state_{index}.pth").rename(tmp_path / "kept")
        with pytest.raises(FileNotFoundError, match=f"checkpoint-8/rng_state_{index}.pth is missing"):
            refuse_damaged(folder, states=True)
        kept.rename(state.with_name(f"rng_state_{index}.pth"))


def test_the_command_says_it_before_it_loads(workplace, tmp_path, monkeypatch) -> None:  # noqa: F811
    with monkeypatch.context() as patched:
        patched.setattr("saap.recovery.job.save", interrupt)
        recover(workplace, "--out", tmp_path / "out", code=130)
    last = last_checkpoint(tmp_path / "out.training")
    empty(last / "scheduler.pt")
    monkeypatch.setattr("saap.recovery.job.open_model", lambda *_: pytest.fail("loaded"))
    refused = recover(workplace, "--out", tmp_path / "out", "--resume", code=2)
    assert f"{last}/scheduler.pt is damaged: File is not a zip file: remove {tmp_path}/out.training" in refused.stderr


def interrupt(*_, **__) -> None:
    raise KeyboardInterrupt
