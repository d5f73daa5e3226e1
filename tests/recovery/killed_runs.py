"""Trainings that are killed, each in a process of its own: ``python -m tests.recovery.killed_runs DIRECTORY``.

One process imports what they need and forks for each, before torch has started any thread.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import torch

from saap.recovery import training_folder, training_loop
from saap.recovery.trainer import train
from tests.recovery.training_cases import learner, some_settings, some_text


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, said=None, held_out=True, **changes) -> None:
    text = some_text(6, 1) if held_out else None
    train(learner(), some_text(), text, some_settings(**changes), folder=folder, said=said)


def after_seven(folder: Path) -> None:
    run(folder, lambda step, loss: step == 7 and kill())


def after_seven_by_ones(folder: Path) -> None:
    run(folder, lambda step, loss: step == 7 and kill(), micro_batch=1)


def writing_parameters(folder: Path) -> None:
    write = training_folder.save_file

    def hooked(tensors, path):
        write(tensors, path)
        if "checkpoint-8" in str(path):
            kill()

    training_folder.save_file = hooked
    run(folder)


def writing_states(folder: Path) -> None:
    write = torch.save

    def hooked(value, path):
        write(value, path)
        if "checkpoint-8/rng" in str(path):
            kill()

    torch.save = hooked
    run(folder)


def before_the_name(folder: Path) -> None:
    move = training_loop.finish_checkpoint
    training_loop.finish_checkpoint = lambda where, step, best: kill() if step == 8 else move(where, step, best)
    run(folder)


def removing_the_old(folder: Path) -> None:
    remove = training_folder.shutil.rmtree

    def hooked(path, **options):
        if (folder / "checkpoint-8").exists():
            kill()
        remove(path, **options)

    training_folder.shutil.rmtree = hooked
    run(folder)


def before_the_first(folder: Path) -> None:
    training_folder.save_file = lambda *args: kill()
    run(folder)


def no_more_bytes(folder: Path) -> None:
    """Files of more than 20 kB cannot be written from step 8 on: the system says so, not a stand-in for it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.RLIMIT_FSIZE
    try:
        run(folder, lambda step, loss: step == 8 and resource.setrlimit(limit, (20_000, 20_000)))
    except OSError as error:
        folder.with_suffix(".txt").write_text(str(error))
        kill()


CASES = (
    after_seven, after_seven_by_ones, writing_parameters, writing_states, before_the_name, removing_the_old,
    before_the_first, no_more_bytes,
)  # fmt: skip


def main(directory: Path) -> None:
    for case in CASES:
        child = os.fork()
        if not child:
            try:
                case(directory / case.__name__)
            finally:
                os._exit(1)  # of those that were not killed
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (case.__name__, status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
