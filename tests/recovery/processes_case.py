"""What two processes do, started by torchrun: ``processes_case.py DIRECTORY``; each writes what it found as JSON."""

import json
import os
import sys
from pathlib import Path

import torch

from saap.distributed import process_group
from saap.recovery import trainer, training_folder, training_loop
from saap.recovery.trainer import train
from saap.recovery.training_folder import learned
from saap.recovery.training_text import TrainingText
from tests.recovery.training_cases import learner, some_settings, some_text
from tests.saap.tiny import tiny_model

RANK = int(os.environ.get("RANK", "0"))


def summary(history, model):
    return {
        "losses": history.losses,
        "evaluations": [[each.step, each.loss] for each in history.evaluations],
        "best": history.best,
        "sums": {name: float(tensor.double().abs().sum()) for name, tensor in learned(model).items()},
    }


def run(folder: Path, model=None, text=None, held_out=True, teacher=None, resume=False, finish=False, **changes):
    model = model or learner()
    held_out = some_text(7, 1) if held_out else None
    settings = some_settings(**changes)
    text = text or some_text()
    history = train(model, text, held_out, settings, folder=folder, teacher=teacher, resume=resume, finish=finish)
    return summary(history, model)


def refused(action) -> str:
    try:
        action()
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def a_teacher():
    return tiny_model("llama", dtype=torch.float32, num_hidden_layers=2, seed=5)


def several_in_one_group(directory: Path):
    with process_group():
        return run(directory / "group", teacher=a_teacher(), hidden=0.1)


def group_threads() -> list[str]:
    """Names of this process's threads that belong to a group of processes."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def left(directory: Path):
    """A training in a group of its own: threads while it trains and after."""
    during = []
    history = train(learner(), some_text(), None, some_settings(), folder=directory / "left",
                    progress=lambda done, total: during.append(group_threads()))  # fmt: skip
    return [len(history.losses), during[-1:], group_threads()]


def micro_batches(directory: Path):
    return run(directory / "micro", micro_batch=1, gradient_checkpointing=True)


def mixture(directory: Path):
    model = tiny_model("mixtral", dtype=torch.float32, num_hidden_layers=2, num_local_experts=8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    return run(directory / "mixture", model, held_out=False, epochs=0.8, seq_len=12)


def unused(directory: Path):
    model = learner()
    model.forgotten = torch.nn.Parameter(torch.ones(3))
    return run(directory / "unused", model)


def fsdp2(directory: Path):
    return sharded(directory / "fsdp2")


def sharded(folder: Path):
    """As ``accelerate launch --use_fsdp`` sets it up; stopped and resumed too.

    accelerate shards on GPUs alone: it is told here that these are some, of which torch's own FSDP has no need.
    """
    from accelerate import DistributedType, PartialState

    names = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "ACCELERATE_TORCH_DEVICE": "cpu",
    }  # fmt: skip
    os.environ.update(names)
    without = [refused(lambda: run(folder))]
    os.environ["FSDP_VERSION"] = "2"
    without.append(refused(lambda: run(folder)))
    backend, refuse = PartialState._prepare_backend, trainer.refuse_sharding
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    trainer.refuse_sharding = lambda device: None
    try:
        model, teacher = learner(), a_teacher()
        found = run(folder, model)
        distilled = run(folder.with_name("fsdp2-distilled"), teacher=teacher, hidden=0.1, micro_batch=1)
        stopped_after_six(lambda: run(folder.with_name(f"{folder.name}-again")))
        again = run(folder.with_name(f"{folder.name}-again"), resume=True)
    finally:
        PartialState._prepare_backend, trainer.refuse_sharding = backend, refuse
        for name in names:
            del os.environ[name]
    kept = sorted(each.name for each in folder.rglob("*") if each.is_file())
    return {
        **found,
        "again": again,
        "distilled": distilled,
        "kept": kept,
        "without": without,
        "whole": type(model.lm_head.weight).__name__,
    }


def resumed(directory: Path):
    stopped_after_six(lambda: run(directory / "resumed"))
    return run(directory / "resumed", resume=True)


def stopped_after_six(action) -> None:
    """In every process, as Ctrl-C does."""
    log = training_loop.RecoveryTrainer.log

    def hooked(self, logs, start_time=None):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        log(self, logs, start_time)

    training_loop.RecoveryTrainer.log = hooked
    assert "goes on from checkpoint-4" in refused(action)
    training_loop.RecoveryTrainer.log = log


def disagreeing(directory: Path):
    other = learner()
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += RANK
    folder = directory / "disagreeing"
    found = [
        refused(lambda: run(folder, text=some_text(seed=RANK))),
        refused(lambda: run(folder, learning_rate=0.1 + RANK)),
        refused(lambda: run(folder, other)),
        refused(lambda: run(folder, batch_size=3)),
    ]
    folder.mkdir(exist_ok=True)
    (folder / "mine.txt").write_text("x")
    return [*found, refused(lambda: run(folder)), sorted(each.name for each in folder.iterdir())]


def faults(directory: Path):
    text = some_text()
    model = learner()
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("nan")
    ids = text.input_ids.clamp(max=62)
    ids[3, 4] = 63
    broken = TrainingText(ids, ids)
    nan = refused(lambda: run(directory / "nan", model, broken, held_out=False, batch_size=2, evaluate_every=1))
    finished = run(directory / "nan", model, broken, held_out=False, batch_size=2, evaluate_every=1, finish=True)
    save = training_folder.save_file

    def full(tensors, path):
        if "checkpoint-8" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    training_folder.save_file = full
    disk = refused(lambda: run(directory / "full"))
    training_folder.save_file = save
    return [nan, disk, finished]


CASES = (several_in_one_group, left, micro_batches, mixture, unused, resumed, disagreeing, faults, fsdp2)


def main(directory: Path) -> None:
    for case in CASES:
        found = case(directory)
        (directory / f"{case.__name__}-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
