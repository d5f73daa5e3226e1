"""Data-parallel calibration by torchrun, two processes with gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import saap
from tests.saap.test_calibrate import assert_same
from tests.saap.tiny import tiny_model, tiny_tokenizer

RENDEZVOUS = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")  # any free port
RUN = (sys.executable, "-m", "torch.distributed.run", *RENDEZVOUS, "-m", "saap")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for family, name in (("llama", "dense"), ("mixtral", "mixture")):
        saap.save(tiny_model(family, torch.float32), folder / name, tokenizer=tiny_tokenizer())
    letters = "the quick brown fox jumps over lazy dogs. "
    (folder / "text.txt").write_text("\n\n".join(letters[i:] + letters[:i] for i in range(3000)))
    return folder


def arguments(folder: Path, out: str, samples: int = 7, model: str = "dense") -> list[str]:
    options = ("--data", folder / "text.txt", "--out", folder / out, "--samples", samples, "--seq-len", 16)
    return [str(a) for a in ("calibrate", folder / model, *options, "--batch-size", 2)]


@pytest.mark.parametrize("model", ["dense", "mixture"])
def test_two_processes_give_the_statistics_of_one_and_the_same_plan(workplace, model: str) -> None:
    options = {"check": True, "capture_output": True, "timeout": 90}
    subprocess.run([*RUN, *arguments(workplace, f"{model}-two.safetensors", model=model)], **options)
    single = [sys.executable, "-m", "saap", *arguments(workplace, f"{model}-one.safetensors", model=model)]
    subprocess.run(single, **options)
    one, two = (saap.Statistics.load(workplace / f"{model}-{name}.safetensors") for name in ("one", "two"))
    assert_same(two, one, rtol=1e-5)  # fp32 models; other micro-batches round otherwise
    assert one.data == two.data and one.settings == two.settings
    plans = [saap.search(saap.score(statistics), 0.3, multiple=8) for statistics in (one, two)]
    assert plans[0].layers == plans[1].layers


def test_fewer_sequences_than_processes_is_one_clear_line(workplace) -> None:
    done = subprocess.run(
        [*RUN, *arguments(workplace, "few.safetensors", 1)], capture_output=True, text=True, timeout=90
    )
    assert done.returncode != 0 and "at least one sequence per process; got 1 for 2 processes" in done.stderr
    assert not (workplace / "few.safetensors").exists()


def test_prune_in_several_processes_says_what_to_do_instead(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="saap prune runs in one process, torchrun started 2: calibrate"):
        from saap.distributed import refuse_ranks

        refuse_ranks("prune", "calibrate with torchrun")


def test_a_killed_rank_ends_the_job_with_an_error(workplace) -> None:
    job = subprocess.Popen([*RUN, *arguments(workplace, "killed.safetensors", 6000)], stderr=subprocess.PIPE, text=True)
    try:
        victim = _worker(job.pid)
        time.sleep(6)  # past the start of the process group, long before the end
        os.kill(victim, signal.SIGKILL)
        _, errors = job.communicate(timeout=90)
    finally:
        job.kill()
    assert job.returncode != 0 and "SIGKILL" in errors
    assert not (workplace / "killed.safetensors").exists()


def _worker(parent: int) -> int:
    """The process id of one rank, once both run."""
    for _ in range(600):
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if len(children) >= 2:
            return int(children[-1])
        time.sleep(0.1)
    raise TimeoutError("torchrun started no ranks within 60 s")
