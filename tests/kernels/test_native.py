"""The compiled module by raw addresses, and what the compiler made of the CUDA sources."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compile_report import bundled
from saap_kernels import _ext

CSRC = Path(__file__).parents[2] / "csrc"


def reduce(g: np.ndarray, w: np.ndarray, columns: int, unit: int, axis: int, threads: int) -> np.ndarray:
    extent = columns if axis else len(g)
    sums = np.zeros((3, extent // unit), np.float32)
    _ext.native().salience_reduce_f32(
        g.ctypes.data, g.shape[1], w.ctypes.data, w.shape[1], len(g), columns, unit, axis, sums.ctypes.data, threads
    )  # fmt: skip
    return sums


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("columns", [1, 7, 16, 64, 1407])
@pytest.mark.parametrize("rows", [1, 3, 64, 257])
def test_salience_reduce_matches_float64(rows: int, columns: int, axis: int) -> None:
    rng = np.random.default_rng(rows * columns)
    g, w = (np.full((rows, columns + pad), np.nan, np.float32) for pad in (3, 5))  # the padding must not be read
    g[:, :columns], w[:, :columns] = rng.standard_normal((2, rows, columns))
    s = g[:, :columns].astype(np.float64) * w[:, :columns]
    extent = columns if axis else rows
    for unit in {1, extent} | ({8} if extent % 8 == 0 else set()):
        lines = [f(s).sum(1 - axis if axis == 0 else 0) for f in (np.abs, np.square, lambda v: np.abs(v - v * v / 2))]
        exact = np.stack(lines).reshape(3, -1, unit).sum(2)
        results = [reduce(g, w, columns, unit, axis, threads) for threads in (1, 1, 2, 3)]
        # positive terms: the relative error of a sum is at most that of its terms and of one fp32 lane's additions
        bound = (4 + max(rows, 1024 // 8)) * 2.0**-24
        # s - s^2 / 2 cancels near s = 2, so its error scales with |s| + s^2 / 2, not with the result
        scale = np.stack([exact[0], exact[1], exact[0] + exact[1] / 2])
        assert (np.abs(results[0] - exact) <= bound * scale).all()
        assert all(np.array_equal(results[0], other) for other in results[1:])


def test_salience_reduce_adds_to_what_is_there() -> None:
    g = np.ones((2, 4), np.float32)
    sums = np.full((3, 2), 10, np.float32)
    _ext.native().salience_reduce_f32(g.ctypes.data, 4, g.ctypes.data, 4, 2, 4, 1, 0, sums.ctypes.data, 1)
    assert sums.tolist() == [[14, 14], [14, 14], [12, 12]]


REGISTERS = {"weight_salience.cu": 255, "activation_sums.cu": 96}  # one block of 256 threads; several of 128


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_cuda_sources_compile_without_spills(tmp_path, arch: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    for source in CSRC.glob("*.cu"):
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, "-O3", "-std=c++17", target, "-Xptxas=-v", "-Werror=all-warnings", "-c", str(source)]
        done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert frames and all(frame == ("0", "0", "0") for frame in frames), done.stderr
        assert max(map(int, re.findall(r"Used (\d+) registers", done.stderr))) <= REGISTERS[source.name]


@pytest.mark.parametrize(("arch", "target"), [("80", "sm_80"), ("90a", "sm_90a")])
def test_cuda_tiles_run_on_tensor_cores_with_16_byte_copies(tmp_path, arch: str, target: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    cubin = tmp_path / "out.cubin"
    source = str(CSRC / "weight_salience.cu")
    command = [nvcc, "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code={target}", "-cubin", "-o", str(cubin)]
    subprocess.run([*command, source], check=True)
    sass = subprocess.run([bundled("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 6  # three dtypes, additive and coupled
    for kernel in kernels:
        found = Counter(re.findall(r"\b(HMMA\.16816|LDSM\.16\.MT88\.4|LDGSTS\.E\.BYPASS\.128|LDL|STL)\b", kernel))
        assert found["LDGSTS.E.BYPASS.128"] >= 12 and not found["LDL"] and not found["STL"]
        if "kernelIf" not in kernel.splitlines()[0]:  # fp32 runs on the ordinary units
            assert found["HMMA.16816"] >= 16 and found["LDSM.16.MT88.4"] >= 8
