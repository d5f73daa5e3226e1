"""``examples/serving/transformers.md`` does what it says: every block is run, and prints what stands below it."""

import os
import shlex
import subprocess
import sys

from tests.serving.pages import ROOT, blocks
from tests.serving.test_server_process import URL, command

SAAP = [sys.executable, "-m", "saap"]


def test_the_page_runs_as_written(tmp_path) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (install, made), load, promised, (start,), greeting, (listing,), call, answered, chat, refused = _parts()
    assert install == "pip install 'saap[serve]'"  # which the tests were given
    _run(SAAP + shlex.split(made)[1:], tmp_path)
    said = _run([sys.executable, "-c", load], tmp_path)
    assert said.count("\n") == promised.count("\n") == 1
    arguments = [tmp_path / "my-llama-20" if word == "my-llama-20" else word for word in shlex.split(start)[2:]]
    assert arguments[-2:] == ["--port", "8000"]
    with command(*arguments[:-1], 0) as (_, lines):
        url = URL.search(lines[0])[1]

        def here(text: str) -> str:
            return text.replace("http://127.0.0.1:8000", url).replace(promised, said)

        told, found = here(greeting).splitlines(), lines
        assert told[1:] == found[1:]
        assert _words(told[0]) == _words(found[0])
        assert '"id":"my-llama-20"' in _run(shlex.split(here(listing)), tmp_path)
        assert _run([sys.executable, "-c", here(call)], tmp_path) == here(answered)
        assert _run([sys.executable, "-c", here(chat)], tmp_path) == refused


def _parts() -> list:
    """The page's blocks, commands split into lines, in the order that the test expects."""
    found = blocks("transformers.md")
    languages = ["bash", "python", "text", "bash", "text", "bash", "python", "text", "python", "text"]
    assert [language for language, _ in found] == languages
    return [text.splitlines() if language == "bash" else text for language, text in found]


def _words(line: str) -> list[str]:
    """A greeting without how many parameters are left, which hangs on the machine's sums, and where they are."""
    return [word for word in line.split() if not word[0].isdigit() and word not in ("cpu)", "cuda)")]


def _run(arguments: list, folder) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
