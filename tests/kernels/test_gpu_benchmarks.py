"""Every benchmark's quick run on a device: a measurement must not fail where it is dear."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
COMPILED = ("--variants", "compiled", "compiled tiled")


@pytest.mark.parametrize("options", [(), COMPILED], ids=["quick", "compiled"])
@pytest.mark.parametrize(
    "name", ["calibration_kernels", "calibrate_model", "calibrate_streamed", "compact_gemm", "recovery_step"]
)
def test_quick_run_writes_rows_of_the_device(tmp_path, name: str, options: tuple[str, ...]) -> None:
    if options and name != "calibration_kernels":
        pytest.skip("nothing of it is compiled")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *options, "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["device"] == torch.cuda.get_device_name() and found["rows"]
    cases = {row["case"] for row in found["rows"]}
    if name == "calibration_kernels":
        peer = "compiled" if options else "cuda"  # Triton and CUDA C++ both run here
        assert f"weight_salience small gate 4x64 / {peer}" in cases
