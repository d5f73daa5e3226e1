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


REGISTERS = {  # of a thread
    "weight_salience.cu": 255,  # one block of 256 threads
    "activation_sums.cu": 96,  # several of 128
    "linear_decode.cu": 255,  # two of 256 or 128, by its launch bounds
    "linear_decode_f32.cu": 128,  # several of 128
}


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


def kernels_of(source: str, arch: str, tmp_path: Path) -> dict[str, Counter]:
    """{kernel: instructions} of a CUDA source, counted by name and modifiers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    cubin = tmp_path / "out.cubin"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    subprocess.run([nvcc, "-O3", "-std=c++17", target, "-cubin", "-o", str(cubin), str(CSRC / source)], check=True)
    sass = subprocess.run([bundled("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = (kernel.split("\n", 1) for kernel in sass.split("Function : ")[1:])
    return {name: Counter(re.findall(r"\b[A-Z][A-Z0-9]+(?:\.\w+)*", body)) for name, body in kernels}


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_cuda_tiles_run_on_tensor_cores_with_16_byte_copies(tmp_path, arch: str) -> None:
    kernels = kernels_of("weight_salience.cu", arch, tmp_path)
    assert len(kernels) == 6  # three dtypes, additive and coupled
    for name, found in kernels.items():
        assert found["LDGSTS.E.BYPASS.128"] >= 12 and not found["LDL"] and not found["STL"]
        if "kernelIf" not in name:  # fp32 runs on the ordinary units
            assert sum(found[each] for each in found if each.startswith("HMMA.16816")) >= 16
            assert found["LDSM.16.MT88.4"] >= 8


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_cuda_products_stream_16_bytes_into_tensor_cores(tmp_path, arch: str) -> None:
    kernels = kernels_of("linear_decode.cu", arch, tmp_path)
    decode = {name: found for name, found in kernels.items() if "linear_decode_kernel" in name}
    assert len(decode) == 20 and len(kernels) == 22  # fp16 and bf16: 16, 8 and 4 bits, two groups of groups, 8 and 16
    for name, found in decode.items():
        tiles, bits = (int(re.search(rf"Li(\d+){rest}", name)[1]) for rest in ("ELb", "ELi"))
        # first and later rounds; a row's 128 bytes are 4, 8 or 16 steps of 16 columns
        assert found["LDGSTS.E.BYPASS.128"] == 2 * 4 * tiles
        assert sum(found[each] for each in found if each.startswith("HMMA.16816")) >= 64 // bits * tiles**2
        assert found["LDS.128"] and not found["LDL"] and not found["STL"]
    for name, found in kernels_of("linear_decode_f32.cu", arch, tmp_path).items():
        assert found["LDG.E.EF.128"] >= 1 and not found["LDL"] and not found["STL"], name
