"""``make gpu`` before a device is at hand: what it imports, what it starts, and how it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU_TESTS = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/kernels/test_gpu*.py"))
# packages of the tests and tools that a machine with a GPU, where nothing is installed, need not have
ABSENT = ("torch_pruning", "datasets", "lm_eval", "peft", "ruff", "mypy", "build")
BLOCKER = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"planted: no module named {{name}}", name=name)
sys.meta_path.insert(0, Absent())
"""
STUB = """#!/bin/sh
case "$1" in -c) exec {python} "$@";; esac
echo "ran $*"
case "$*" in *"{failing}"*) exit 3;; esac
"""


def test_every_gpu_test_is_collected_with_the_packages_of_the_device(tmp_path) -> None:
    (tmp_path / "absent.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "absent", "--collect-only", "-q", "-m", "gpu", *GPU_TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and len(GPU_TESTS) == 8, done.stdout[-3000:] + done.stderr[-2000:]
    assert all(f"{file}::test_" in done.stdout for file in GPU_TESTS)


def test_every_benchmark_imports_with_the_packages_of_the_device(tmp_path) -> None:
    from benchmarks.run import BENCHMARKS

    modules = ", ".join(f"benchmarks.{name}" for name in ("run", "compile_report", *dict(BENCHMARKS)))
    code = f"{BLOCKER}\nimport tests.kernels.sanitize, {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_gpu(tmp_path, failing: str) -> subprocess.CompletedProcess[str]:
    """``make gpu`` with a Python that only says what it was asked to run, and fails where it is told."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, failing=failing))
    stub.chmod(0o755)
    command = ["make", "gpu", f"GPU_PYTHON={stub}", "MINUTES=8", f"RESULTS={tmp_path}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_part_runs_once_and_in_order(tmp_path) -> None:
    done = make_gpu(tmp_path, "nothing")
    assert done.returncode == 0, done.stderr
    ran = [line.split()[1:4] for line in done.stdout.splitlines() if line.startswith("ran ")]
    parts = ["setup.py", "pytest", "benchmarks.run", "tests.kernels.sanitize"]
    assert [next(part for part in parts if part in line) for line in ran] == parts
    assert f"--results {tmp_path} --minutes 8" in done.stdout


@pytest.mark.parametrize(("failing", "part"), [("-m pytest", "gpu-test"), ("-m benchmarks.run", "gpu-bench")])
def test_a_failing_part_keeps_no_other_from_running_and_is_named(tmp_path, failing: str, part: str) -> None:
    done = make_gpu(tmp_path, failing)
    assert done.returncode != 0 and f"failed: {part}\n" in done.stdout
    assert "ran -m tests.kernels.sanitize" in done.stdout


def test_nothing_runs_when_the_build_fails(tmp_path) -> None:
    done = make_gpu(tmp_path, "setup.py")
    assert done.returncode != 0 and "ran -m" not in done.stdout
