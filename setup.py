"""Builds saap_kernels._C: a C++ part always, CUDA objects when nvcc is found; torch is not needed.

Environment: SAAP_BUILD_CUDA=0 leaves CUDA out, =1 makes its absence an error; SAAP_CUDA_ARCHS
(default "80;90a") names targets; SAAP_NVCC or PATH finds nvcc.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from pybind11.setup_helpers import Pybind11Extension, build_ext

CPU_SOURCES = [
    f"csrc/{name}.cpp"
    for name in ("bindings", "activation_sums", "linear_cpu", "moved_levels", "salience_reduce", "unpack_cpu")
]
CPU_HEADERS = ["csrc/packed_blocks.h", "csrc/packed_rows.h"]
CUDA_SOURCES = [
    f"csrc/{name}.cu" for name in ("activation_sums", "weight_salience", "linear_decode", "linear_decode_f32")
]
CUDA_HEADERS = [
    "csrc/kernels.h",
    *(f"csrc/{name}.cuh" for name in ("device", "linear_decode", "linear_decode_stage", "linear_decode_multiply")),
]
DEFAULT_ARCHS = "80;90a"


def find_nvcc() -> str | None:
    """Path of nvcc, or None when CUDA is to be left out; says why in one line."""
    wanted = os.environ.get("SAAP_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"SAAP_BUILD_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        print("saap: CUDA kernels left out (SAAP_BUILD_CUDA=0)", file=sys.stderr)
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")  # where NVIDIA's installers put it
    nvcc = os.environ.get("SAAP_NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if nvcc is None:
        if wanted == "1":
            raise SystemExit(f"SAAP_BUILD_CUDA=1, but nvcc was not found on PATH, in {home}/bin or as SAAP_NVCC")
        print("saap: CUDA kernels left out (nvcc not found); the CPU kernels are built", file=sys.stderr)
    return nvcc


def toolkit_root(nvcc: str) -> Path:
    """The toolkit folder, as nvcc itself names it (nvcc may be a wrapper script)."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{nvcc} --dryrun does not name its toolkit:\n{plan.stderr}")
    return Path(found.group(1)).resolve()


def supported_archs(nvcc: str) -> list[str]:
    """The targets of SAAP_CUDA_ARCHS; defaults that this nvcc does not know are dropped."""
    asked = os.environ.get("SAAP_CUDA_ARCHS", "")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    archs = [arch for arch in (asked or DEFAULT_ARCHS).split(";") if arch]
    missing = [arch for arch in archs if f"sm_{arch.rstrip('af')}" not in known]
    if asked and missing:
        raise SystemExit(f"SAAP_CUDA_ARCHS: {nvcc} does not support {', '.join(missing)}")
    return [arch for arch in archs if arch not in missing]


def content_hash(nvcc: str, source: str, options: list[str]) -> str:
    """Of all that decides what nvcc makes of one source."""
    release = subprocess.run([nvcc, "--version"], capture_output=True).stdout
    contents = [Path(file).read_bytes() for file in (source, *CUDA_HEADERS)]
    return hashlib.sha256(b"\0".join([release, *map(str.encode, options), *contents])).hexdigest()[:16]


class BuildOnly(setuptools.Distribution):
    """A distribution without pyproject.toml, whose license expression setuptools before 77 refuses to read."""

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        super().parse_config_files([] if filenames is None else filenames, ignore_option_errors)


def distribution() -> type[setuptools.Distribution]:
    """What suffices to build in place; packages need setuptools 77, which an isolated build fetches."""
    if int(setuptools.__version__.split(".")[0]) >= 77:
        return setuptools.Distribution
    if sys.argv[1:2] != ["build_ext"]:
        raise SystemExit(f"setuptools {setuptools.__version__} builds in place only (build_ext): 77 makes packages")
    return BuildOnly


class BuildNative(build_ext):
    """Compiles the .cu files with nvcc and hands their objects to the ordinary C++ build."""

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        self.force = True  # no file's time says whether an earlier build had CUDA in it
        if self._openmp_works():
            extension.extra_compile_args.append("-fopenmp")
            extension.extra_link_args.append("-fopenmp")
        nvcc = find_nvcc()
        if nvcc is not None:
            self._add_cuda(extension, nvcc)
        super().build_extensions()

    def _openmp_works(self) -> bool:
        source = Path(self.build_temp) / "openmp.cpp"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++"
        command = [compiler, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    def _add_cuda(self, extension: Pybind11Extension, nvcc: str) -> None:
        root, archs = toolkit_root(nvcc), supported_archs(nvcc)
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        options = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", *targets]
        running = []
        for source in CUDA_SOURCES:
            target = folder / f"{Path(source).stem}_{content_hash(nvcc, source, options)}.o"
            extension.extra_objects.append(str(target))
            if not target.exists():  # copied trees have new times: what was compiled is told by its contents
                command = [nvcc, *options, "-c", source, "-o", str(target.with_suffix(".part.o"))]
                print("saap:", " ".join(command), file=sys.stderr)
                running.append((subprocess.Popen(command), target))
        for process, target in running:
            if process.wait():
                raise SystemExit(f"{nvcc} failed on {target.name}; its messages are above")
            target.with_suffix(".part.o").replace(target)
        extension.define_macros += [("SAAP_CUDA", "1"), ("SAAP_CUDA_ARCHS", f'"{";".join(archs)}"')]
        libraries = [root / "lib64", root / "lib", root / "targets/x86_64-linux/lib"]
        extension.library_dirs += [str(path) for path in libraries if (path / "libcudart_static.a").exists()]
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]  # static: imports without a driver


setuptools.setup(
    distclass=distribution(),
    ext_modules=[
        Pybind11Extension(
            "saap_kernels._C",
            CPU_SOURCES,
            cxx_std=17,
            include_dirs=["csrc"],
            depends=[*CPU_HEADERS, *CUDA_HEADERS, *CUDA_SOURCES],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
