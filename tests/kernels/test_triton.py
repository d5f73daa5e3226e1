"""Triton kernels with no GPU: interpreted, and compiled for sm_80 and sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


def test_interpreted_kernels_agree_with_float64() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_what_a_device_would_launch_compiles() -> None:
    """The cases that are cheap and special: single tokens, tails, chosen orders. All: see compile_only.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.kernels.compile_only"]
    chosen = [str(CASES), "-k", "orders or whole_blocks or one_token or as_they_need"]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0 and "10 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def reports():
    from benchmarks.compile_report import reports

    return list(reports())


@pytest.fixture(scope="module")
def compiled():
    return reports()


def test_compiled_kernels_keep_their_inner_loop_in_registers(compiled) -> None:
    assert {report.capability for report in compiled} == {80, 90}
    for report in compiled:
        assert report.loop_spills == 0, report
        # fp32 is the correctness path: on sm_80 values used once per tile wait on the stack
        assert report.stack_bytes <= (64 if "fp32" in report.kernel else 0), report


def test_compiled_kernels_fit_shared_memory(compiled) -> None:
    from benchmarks.compile_report import SHARED_LIMIT

    for report in compiled:
        assert report.shared_bytes <= SHARED_LIMIT[report.capability], report


def test_as_many_programs_fit_a_multiprocessor_as_the_launch_counts_on(compiled) -> None:
    assert {report.per_processor for report in compiled} == {1, 2}
    for report in compiled:
        assert report.occupancy[0] >= report.per_processor, report
        if report.kernel.startswith("activation"):
            assert report.occupancy[0] * report.warps >= 24, report  # reads in flight to fill the memory's latency


def test_occupancy_is_what_the_scarcest_resource_allows() -> None:
    from benchmarks.compile_report import Report

    def occupancy(registers: int, shared: int, warps: int, capability: int = 90) -> tuple[int, str]:
        return Report("", capability, warps, registers, 0, shared, {}, 0).occupancy

    assert occupancy(128, 0, 4) == (4, "registers")  # 4 x 128 threads x 128
    assert occupancy(129, 0, 4) == (3, "registers")  # 136 are given out
    assert occupancy(32, 115_712, 4) == (2, "shared") and occupancy(32, 115_713, 4) == (1, "shared")
    assert occupancy(32, 115_712, 4, capability=80) == (1, "shared")
    assert occupancy(16, 0, 8) == (8, "warps") and occupancy(16, 0, 1) == (32, "warps")


def test_tiles_on_hopper_use_wgmma_and_tma_and_nothing_else(compiled) -> None:
    tiles = [report for report in compiled if "_salience" in report.kernel and "fp32" not in report.kernel]
    assert len(tiles) == 24
    for report in tiles:
        used = {kind for kind, count in report.counts.items() if count}
        assert used == ({"wgmma", "tma"} if report.capability == 90 else {"mma", "cp", "cp16"}), report


def test_no_kernel_reads_less_than_four_bytes_at_a_time(compiled) -> None:
    names = {report.kernel for report in compiled}
    assert {"activation salience bf16", "activation sum+square+absmax bf16", "activation sums of sequences"} <= names
    for report in compiled:
        assert report.counts["narrow"] == 0, report


def test_tiles_are_chosen_by_class_of_shape_not_by_exact_width() -> None:
    from saap_kernels.triton_weight_salience import choose_config

    options = {"dtype": torch.bfloat16, "coupled": False, "processors": 132, "capability": 90}
    wide = {choose_config(lines, 4096, **options) for lines in range(10_000, 11_009, 7)}
    assert len(wide) == 1
    assert choose_config(512, 4096, **options) not in wide


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_hopper_tiles_are_for_hopper_alone(capability: int) -> None:
    from saap_kernels.triton_weight_salience import choose_config

    for lines, coupled in ((11008, False), (512, False), (4096, True)):
        options = {"dtype": torch.bfloat16, "coupled": coupled, "processors": 132, "capability": capability}
        config = choose_config(lines, 4096, **options)
        assert config.descriptors == (capability == 90)
        assert (config.block_r == 256) == (capability == 90 and lines == 11008)


SHARED_BYTES = {86: 101_376, 89: 101_376, 100: 232_448, 120: 101_376}  # of one block: CUDA programming guide


@pytest.mark.parametrize("capability", [89, 100, 120])
def test_tiles_of_other_devices_compile_and_fit_their_shared_memory(capability: int) -> None:
    from benchmarks.compile_report import weight_salience_report
    from saap_kernels.triton_weight_salience import choose_config

    for lines, coupled in ((11008, False), (512, False), (4096, True)):
        options = {"dtype": torch.bfloat16, "coupled": coupled, "processors": 132, "capability": capability}
        config = choose_config(lines, 4096, **options)
        report = weight_salience_report(capability, torch.bfloat16, config, coupled=coupled, axis="out")
        assert report.shared_bytes * report.per_processor <= SHARED_BYTES[capability] and report.loop_spills == 0


@pytest.mark.parametrize("coupled", [False, True])
def test_kernels_compile_where_sizes_of_one_become_constants(coupled: bool) -> None:
    from benchmarks.compile_report import weight_salience_report
    from saap_kernels.triton_weight_salience import choose_config

    config = choose_config(1, 1, torch.bfloat16, coupled=coupled, processors=132, capability=90)
    ones = ("U", "R", "p_columns8", "q_columns8", "p_pitch8", "q_pitch8", "w_stride_u", "block_count", "plane")
    report = weight_salience_report(90, torch.bfloat16, config, coupled=coupled, axis="out", ones=ones)
    assert report.counts["wgmma"] > 0
