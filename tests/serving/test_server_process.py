"""``saap serve`` as a command: how it starts, what it refuses before it listens, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from typer.testing import CliRunner

from saap.cli import app
from saap.serving import server
from tests.serving.running import saved

URL = re.compile(r"at (http://\S+)/v1")


@contextmanager
def command(*arguments) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """The command, once it says where it is, and the lines that it greets with."""
    process = subprocess.Popen(
        [sys.executable, "-m", "saap", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                break
        else:
            raise AssertionError(process.stderr.read())
        yield process, lines
    finally:
        watch.cancel()
        process.kill()
        process.communicate()


def refused(*arguments) -> str:
    """The one line that a command which serves nothing ends with."""
    done = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert done.exit_code == 2 and "serving" not in done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_how_to_call_it_and_ends_cleanly_while_it_streams(tmp_path, number: int) -> None:
    folder = saved(tmp_path / "tiny")
    with command(folder, "--port", 0, "--name", "mine") as (process, lines):
        assert lines[0].startswith("serving mine (SaapLlamaForCausalLM, ") and "float32 on c" in lines[0]
        url = URL.search(lines[0])[1]
        text = "\n".join(lines)
        assert f"curl {url}/v1/completions" in text and f'OpenAI(base_url="{url}/v1"' in text
        shown = re.search(r"curl (\S+) -H '(\S+): (\S+)' \\\n +-d '(.*)'", text)
        answer = httpx.post(shown[1], headers={shown[2]: shown[3]}, content=shown[4])
        assert answer.json()["usage"]["completion_tokens"] == 16
        body = {"model": "mine", "prompt": "a", "max_tokens": 500, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as stream:
            next(stream.iter_raw())
            process.send_signal(number)
            assert process.wait(server.GRACE + 15) == 0
        output, errors = process.communicate()
        assert output == "" and "Traceback" not in errors


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = refused(tmp_path / "there is no model here", "--port", port)
    assert told.startswith(f"error: cannot listen on 127.0.0.1, port {port}: Address already in use; --port 0 ")
    assert "cannot listen on no.such.host.invalid" in refused(tmp_path, "--host", "no.such.host.invalid")


def test_nothing_listens_before_the_model_is_there(tmp_path, monkeypatch) -> None:
    folder, tried = saved(tmp_path / "tiny"), []
    take = server.bound

    @contextmanager
    def watched(host: str, port: int):
        with take(host, port) as listener:
            tried.append(listener.getsockname())
            yield listener

    def load(*_):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(tried[0], timeout=5)
        raise ValueError("stop here")

    monkeypatch.setattr(server, "bound", watched)
    monkeypatch.setattr(server, "open_model", load)
    assert refused(folder, "--port", 0) == "error: stop here\n" and len(tried) == 1


def test_what_is_no_whole_checkpoint_is_refused(tmp_path) -> None:
    folder = saved(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for name, data in (("truncated", whole[:-100]), ("corrupt", b"\xff" * 8 + whole[8:]), ("empty", b"")):
        weights.write_bytes(data)
        told = refused(folder, "--port", 0)
        assert "model.safetensors is not a complete safetensors file" in told, name
    weights.unlink()
    assert "expected .safetensors weights in" in refused(folder, "--port", 0)
    assert "expected a local model directory, found none at some/name" in refused("some/name", "--port", 0)
    weights.write_bytes(whole)
    for file in folder.glob("token*"):
        file.unlink()
    assert "expected a tokenizer beside the model" in refused(folder, "--port", 0)


def test_missing_packages_and_odd_options_are_named(tmp_path, monkeypatch) -> None:
    assert "bits=4 quantises for our kernels: it needs accelerate (--accelerate)" in refused(tmp_path, "--bits", 4)
    assert "port: expected 0 to 65535, got 70000" in refused(tmp_path, "--port", 70000)
    find = server.find_spec
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert refused(tmp_path) == "error: serving needs uvicorn: pip install 'saap[serve]'\n"


def test_the_command_needs_no_server_package_to_be_described() -> None:
    code = "import sys, saap.cli; print([m for m in ('fastapi', 'uvicorn', 'openai') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
