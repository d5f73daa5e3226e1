"""Wheel and sdist: built under isolation without torch, with the right files, with and without nvcc."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build from a copy of the tracked sources, so that leftovers of this checkout cannot help."""
    source = tmp_path / "source"
    if not source.exists():
        wanted = ("csrc", "saap", "saap_kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
        for name in (*wanted, "CHANGELOG.md"):
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            source.mkdir(exist_ok=True)
            copy(ROOT / name, source / name, **({"ignore": ignore} if copy is shutil.copytree else {}))
    command = [sys.executable, "-m", "build", "--no-isolation", *arguments, "-o", str(tmp_path / "dist"), str(source)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_wheel_without_cuda_says_so_and_holds_both_packages(tmp_path) -> None:
    done = build(tmp_path, "--wheel", SAAP_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CUDA kernels left out (SAAP_BUILD_CUDA=0)" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"saap/py.typed", "saap_kernels/py.typed", "saap/template/modeling_saap.py"} <= set(names)
    assert "saap_kernels/switch_points/__main__.py" in names
    assert {f"saap/report_template/{n}" for n in ("report.html.j2", "charts.html.j2", "style.css")} <= set(names)
    assert [n for n in names if re.fullmatch(r"saap_kernels/_C\..*\.so", n)]
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "csrc/"))]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import saap_kernels._C as c; print(c.cuda_built, c.__file__)"
    target = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(target)
    (target / "saap_kernels/__init__.py").write_text("")  # the compiled module alone needs no torch
    out = subprocess.run([sys.executable, "-I", "-c", code, str(target)], capture_output=True, text=True, check=True)
    assert out.stdout.split()[0] == "False" and str(target) in out.stdout


def test_missing_nvcc_is_one_line_and_an_error_only_if_cuda_was_asked_for(tmp_path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("g++", "gcc", "cc", "c++", "ld", "as", "x86_64-linux-gnu-gcc", "x86_64-linux-gnu-g++", "uname", "sh"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    hidden = {"PATH": str(folder), "CUDA_HOME": str(tmp_path / "no-cuda"), "SAAP_NVCC": ""}
    done = build(tmp_path, "--wheel", **hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CUDA kernels left out (nvcc not found); the CPU kernels are built" in done.stdout + done.stderr
    done = build(tmp_path, "--wheel", SAAP_BUILD_CUDA="1", **hidden)
    assert done.returncode != 0 and "SAAP_BUILD_CUDA=1, but nvcc was not found" in done.stdout + done.stderr


def test_wheel_with_nvcc_holds_the_cuda_kernels(tmp_path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    assert build(tmp_path, "--wheel", SAAP_BUILD_CUDA="0").returncode == 0  # its module must not pass for the next one
    done = build(tmp_path, "--wheel", SAAP_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    target = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(target)
    (target / "saap_kernels/__init__.py").write_text("")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from saap_kernels import _C; "
    code += "print(_C.cuda_built, _C.cuda_versions())"
    out = subprocess.run([sys.executable, "-I", "-c", code, str(target)], capture_output=True, text=True, check=True)
    # imported, and asked for the versions of the driver and the runtime, on a machine that may have no driver
    assert re.match(r"True \(\d+, 1\d\d\d\d\)", out.stdout)


def test_bad_build_settings_are_named(tmp_path) -> None:
    done = build(tmp_path, "--wheel", SAAP_BUILD_CUDA="yes")
    assert done.returncode != 0 and "expected 0, 1 or nothing, got 'yes'" in done.stdout + done.stderr


def test_sdist_holds_the_sources(tmp_path) -> None:
    done = build(tmp_path, "--sdist")
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


def run_as_setuptools_75(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """setup.py where setuptools says that it is older than the license expression of pyproject.toml."""
    code = "import runpy, setuptools; setuptools.__version__ = '75.0'; runpy.run_path('setup.py', run_name='__main__')"
    environment = os.environ | {"SAAP_BUILD_CUDA": "0"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)


def test_an_older_setuptools_builds_in_place_and_refuses_the_rest(tmp_path) -> None:
    for name in ("csrc", "saap_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "saap"\nlicense = 3\n')  # what no version reads
    done = run_as_setuptools_75(tmp_path, "build_ext", "--inplace")
    assert done.returncode == 0 and list(tmp_path.glob("saap_kernels/_C*.so")), done.stdout + done.stderr
    done = run_as_setuptools_75(tmp_path, "sdist")
    assert done.returncode == 1 and "setuptools 75.0 builds in place only (build_ext)" in done.stderr
