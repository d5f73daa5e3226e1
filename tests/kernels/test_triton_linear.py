"""Triton inference kernels with no GPU: interpreted, compiled for sm_80 and sm_90, and how their tiles are chosen."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saap_kernels.triton_config import WHOLE_ROW, Problem, choose_config, step_columns

CASES = Path(__file__).with_name("triton_linear_cases.py")
COMMAND = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
DECODE = Problem(1, 4096, 4096, 16, WHOLE_ROW, torch.bfloat16, False, 132, 90)
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # of one block


def test_interpreted_kernels_agree_with_float64() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*COMMAND, str(CASES)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_what_a_device_would_launch_compiles() -> None:
    """Splits of every kind of weight, both stages. All: see compile_only.py."""
    chosen = ["-p", "tests.kernels.compile_only", str(CASES), "-k", "splits_are_added or splits_of"]
    done = subprocess.run([*COMMAND, *chosen], capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0 and "15 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def compiled():
    from benchmarks.compile_inference import inference_reports

    return [report for capability in (80, 90) for report in inference_reports(capability)]


def test_nothing_spills_and_everything_fits(compiled) -> None:
    for report in compiled:
        # fp32 is the correctness path; elsewhere two indices that only the end needs may wait for it on the stack
        assert report.stack_bytes <= (64 if "fp32" in report.kernel else 8), report
        assert report.shared_bytes <= SHARED_BYTES[report.capability], report


def test_products_run_on_tensor_cores_and_read_sixteen_bytes_at_a_time(compiled) -> None:
    products = [report for report in compiled if "bits" in report.kernel and "fp32" not in report.kernel]
    assert len(products) == 36
    for report in products:
        # instructions of Hopper take 64 tokens and more, and few tokens gain nothing from them
        hopper = report.capability == 90 and " 128x" in report.kernel
        assert report.counts["wgmma" if hopper else "mma"] > 0 and report.counts["cp16"] > 0, report
        # elsewhere some tiles have less than 16 bytes for a thread: groups of 32 and gated int4 of many tokens
        if hopper or (" 16x" in report.kernel and "fp16" not in report.kernel):
            assert report.counts["cp"] == report.counts["cp16"], report


def test_two_programs_of_few_tokens_fit_a_multiprocessor(compiled) -> None:
    """As many as K is split for."""
    few = [report for report in compiled if " 16x" in report.kernel and "fp32" not in report.kernel]
    assert len(few) == 22 and all(report.occupancy[0] >= 2 for report in few)


def test_second_stages_read_whole_lines(compiled) -> None:
    finish = [report for report in compiled if "sums of splits" in report.kernel]
    assert len(finish) == 4 and all(report.occupancy[0] * report.warps >= 48 for report in finish)


def run_ptx(code: str, packed: int) -> list[int]:
    """$0 to $3 after the few instructions of 32 bits that ``code`` is made of, with $4 = ``packed``."""
    registers = {"$4": packed}
    for name, operands in re.findall(r"^\s*(\w+)\.b32 (\S.*);$|", code.replace("shr.u32", "shr.b32"), re.M):
        if not name:
            continue
        target, *sources = operands.split(", ")
        values = [registers[each] if each in registers else int(each, 0) for each in sources]
        if name == "and":
            registers[target] = values[0] & values[1]
        elif name == "shr":
            registers[target] = values[0] >> values[1]
        else:
            assert name == "prmt"
            pool = (values[0] | values[1] << 32).to_bytes(8, "little")
            chosen = bytes(pool[values[2] >> 4 * index & 7] for index in range(4))
            registers[target] = int.from_bytes(chosen, "little")
    return [registers[f"${index}"] for index in range(4)]


@pytest.mark.parametrize(("name", "offset"), [("HALVES_BF16", 128), ("HALVES_FP16", 1024)])
def test_the_assembly_of_halves(name, offset) -> None:
    """The interpreter has no assembler: instruction by instruction here, with what the PTX manual says of each."""
    from saap_kernels import triton_packed

    dtype = torch.bfloat16 if offset == 128 else torch.float16
    for packed in (0x00000000, 0xFFFFFFFF, 0x12345678, 0x9ABCDEF0, 0x0F1E2D3C):
        results = run_ptx(getattr(triton_packed, name).value, packed)
        words = torch.tensor([word >> shift & 0xFFFF for word in results for shift in (0, 16)], dtype=torch.int32)
        numbers = words.to(torch.uint16).view(dtype).float() - offset
        stored = packed.to_bytes(4, "little")
        assert numbers.tolist() == [byte & 15 for byte in stored] + [byte >> 4 for byte in stored]


def test_tiles_are_chosen_by_class_of_shape_not_by_exact_width() -> None:
    for tokens, gated in ((1, False), (16, True), (17, False), (4096, True)):
        found = {
            replace(choose_config(replace(DECODE, tokens=tokens, rows=rows, columns=columns, gated=gated)), splits=1)
            for rows in range(10_000, 11_009, 7)
            for columns in (4096, 4099)
        }
        assert len(found) == 1


@pytest.mark.parametrize("capability", [89, 100, 120])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_tiles_of_other_devices_compile_and_fit_their_shared_memory(tokens, gated, capability) -> None:
    from benchmarks.compile_inference import inference_report

    report = inference_report(capability, torch.bfloat16, 16, tokens, gated=gated)
    assert report.shared_bytes <= SHARED_BYTES[capability] and report.stack_bytes == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 160, 192, 256, 4096, WHOLE_ROW])
def test_a_step_lies_within_one_group(group, bits) -> None:
    for most in (32, 64, 128):
        columns = step_columns(most, bits, group)
        # the halves of a block of int4 are scaled apart
        assert group % (32 if bits == 4 and group % 64 else columns) == 0
        assert columns <= max(most, 64 if bits == 4 else 32) and columns % (64 if bits == 4 else 32) == 0
    assert step_columns(128, 16, WHOLE_ROW) == 128


def test_k_is_split_where_tiles_are_few() -> None:
    assert choose_config(replace(DECODE, rows=11008)).splits == 2
    assert choose_config(replace(DECODE, rows=264 * 64)).splits == 1  # two programs on each multiprocessor already
    assert choose_config(DECODE).splits == 5 and choose_config(replace(DECODE, tokens=17)).splits == 1
