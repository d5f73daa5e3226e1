"""Compile csrc/ with the emulator in place of CUDA: a module like saap_kernels._C whose kernels run on the host."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

CSRC = Path(__file__).parents[3] / "csrc"


def build_emulated(folder: Path) -> ModuleType:
    """The module, compiled into ``folder``."""
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [str(path) for path in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("*.cu")])]
    includes = [
        f"-I{path}" for path in (Path(__file__).parent, CSRC, pybind11.get_include(), sysconfig.get_path("include"))
    ]
    flags = [
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-fopenmp",
        "-DSAAP_EMULATE",
        "-DSAAP_CUDA",
        '-DSAAP_CUDA_ARCHS="host"',
    ]
    command = ["g++", *flags, *includes, "-x", "c++", *sources, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    spec = importlib.util.spec_from_file_location("_C", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.pop("_C", None)
    spec.loader.exec_module(module)
    return module
