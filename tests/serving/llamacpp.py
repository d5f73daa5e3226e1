"""llama.cpp as the cases use it: in its own environment, which ``make test-llamacpp`` makes."""

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("LLAMACPP_PYTHON", ROOT / ".venv-llamacpp/bin/python"))
WORKER = Path(__file__).with_name("llamacpp_worker.py")
READY_SECONDS = 120


@dataclass(frozen=True)
class Answers:
    """What llama.cpp computed: see ``llamacpp_worker``."""

    meta: dict[str, str]
    ids: list[list[int]]
    logits: list[np.ndarray]
    tokens: list[list[int]]


def ask(
    model: Path,
    ids: Sequence[Sequence[int]] = (),
    *,
    greedy: int = 0,
    texts: Sequence[str] = (),
    special: bool = False,
) -> Answers:
    """Logits after ``ids`` and ``greedy`` more tokens, and the tokens of ``texts``, by llama.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder) / "request.json", Path(folder) / "out.npz"
        asked = {"model": str(model), "ids": [list(each) for each in ids], "greedy": greedy}
        request.write_text(json.dumps(asked | {"texts": list(texts), "special": special}))
        done = subprocess.run([PYTHON, WORKER, request, out], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found = np.load(out)
        return Answers(
            meta=json.loads(str(found["meta"])),
            ids=[found[f"ids_{index}"].tolist() for index in range(len(ids))],
            logits=[found[f"logits_{index}"] for index in range(len(ids))],
            tokens=[found[f"tokens_{index}"].tolist() for index in range(len(texts))],
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: Sequence[str], port: int, cwd: Path) -> Iterator[str]:
    """The address of a server while it runs; ``command`` is what follows ``python``."""
    log = cwd / f"server-{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen([PYTHON, *command], cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/v1/models", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"no server after {READY_SECONDS} s: {log.read_text()}")
