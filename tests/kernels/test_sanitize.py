"""The driver of compute-sanitizer, with a tool of our own in its place."""

import os
import sys

import pytest

from tests.kernels import sanitize


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a compute-sanitizer on an otherwise empty PATH that prints a line and exits with the code it is told."""

    def make(body: str) -> None:
        file = tmp_path / sanitize.TOOL
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    return make


def test_a_missing_tool_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    assert sanitize.main() == 0 and capsys.readouterr().out == "compute-sanitizer is not on the PATH: skipped\n"


def test_a_tool_that_cannot_attach_is_one_line(tool, capsys) -> None:
    tool("echo '========= Device not supported'; exit 1")
    assert sanitize.main() == 0
    line = "compute-sanitizer cannot attach here: skipped (========= Device not supported)\n"
    assert capsys.readouterr().out == line


def test_errors_are_told_apart_from_clean_runs(tool, capsys) -> None:
    tool('case "$*" in *racecheck*triton*) echo hazard; exit 9;; esac; test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1')
    assert sanitize.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["memcheck, cuda: clean", "racecheck, cuda: clean", "memcheck, triton: clean",
                     "racecheck, triton: errors", "hazard"]  # fmt: skip


def test_the_cases_run_on_a_cpu_too() -> None:
    sanitize.run_cases("reference", "cpu")
