"""What the Triton compiler makes of every kernel, with no GPU: registers, spills, shared memory, instructions.

``python -m benchmarks.compile_report`` compiles each frozen configuration for sm_80 and sm_90 and
reads the cubin. "per SM" are the programs that fit one multiprocessor and what keeps it from holding more;
"wgmma" and "mma" are matrix instructions and "tma" and "cp" copies into shared memory in the PTX, "cp16" those of 16
bytes, "narrow" loads of less than four; "spills"
are stack accesses among the matrix instructions (stack bytes may hold values that are used once per tile).
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saap_kernels import triton_activations
from saap_kernels.planes import PLANES
from saap_kernels.triton_weight_salience import TileConfig, choose_config, weight_salience_kernel

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # of one program
SHARED, RESERVED = {80: 167_936, 90: 233_472}, 1024  # of a multiprocessor, and taken by each program beside its own
REGISTERS, WARPS, PROGRAMS = 65_536, 64, 32  # of a multiprocessor
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
COUNTED = {  # instructions of the PTX
    "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tma": r"cp\.async\.bulk\.tensor",
    "cp": r"cp\.async\.c[ag]\.shared\.global", "cp16": r"cp\.async\.cg\.", "narrow": r"ld\.global\.b(?:8|16)\b",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Resources and instructions of one specialisation."""

    kernel: str
    capability: int
    warps: int
    registers: int  # of a thread
    stack_bytes: int
    shared_bytes: int
    counts: dict[str, int]  # by COUNTED
    loop_spills: int  # loads from or stores to the stack between the first and the last matrix instruction
    per_processor: int = 1  # programs that its launch counts on

    @property
    def occupancy(self) -> tuple[int, str]:
        """Programs that fit one multiprocessor, and by what they are limited.

        Registers are given out to a warp in units of 256.
        """
        of_warp = -(-self.registers * 32 // 256) * 256
        limits = {
            "registers": REGISTERS // of_warp // self.warps,
            "shared": SHARED[self.capability] // (self.shared_bytes + RESERVED),
            "warps": min(PROGRAMS, WARPS // self.warps),
        }
        limit = min(limits, key=limits.__getitem__)
        return limits[limit], limit

    def __str__(self) -> str:
        programs, limit = self.occupancy
        counts = " ".join(f"{self.counts[name]:6}" for name in COUNTED)
        return (
            f"{self.kernel:66} sm_{self.capability} {self.registers:9} {self.stack_bytes:5} {self.shared_bytes:7} "
            f"{programs:3} ({limit:9}) {counts} {self.loop_spills:6}"
        )


def compile_kernel(
    name: str, kernel: Any, capability: int, signature: dict[str, str], constants: dict[str, Any],
    divisible: set[str], warps: int, stages: int, per_processor: int = 1,
) -> Report:  # fmt: skip
    """Compile one specialisation; ``divisible`` names arguments known to be multiples of 16."""
    types = {arg: "constexpr" if arg in constants else signature[arg] for arg in kernel.arg_names}
    hints = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in divisible if arg not in constants}
    source = ASTSource(kernel, types, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, hints)
    target = GPUTarget("cuda", capability, 32)
    done = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    ptx = done.asm["ptx"]
    registers, stack = _resources(done.asm["cubin"])
    return Report(
        kernel=name,
        capability=capability,
        warps=warps,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=done.metadata.shared,
        counts={kind: len(re.findall(pattern, ptx)) for kind, pattern in COUNTED.items()},
        loop_spills=_loop_spills(done.asm["cubin"]),
        per_processor=per_processor,
    )


def bundled(tool: str) -> Path:
    """Path of one of the NVIDIA tools that Triton bundles."""
    return Path(triton.__file__).parent / "backends/nvidia/bin" / tool


def _disassemble(tool: str, option: str, cubin: bytes) -> str:
    """Output of a bundled tool."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([bundled(tool), option, file], capture_output=True, text=True, check=True).stdout


def _loop_spills(cubin: bytes) -> int:
    """Loads from and stores to the stack between the first and the last matrix instruction."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", _disassemble("nvdisasm", "-c", cubin))
    matrix = [index for index, (_, text) in enumerate(lines) if re.search(r"\b(HGMMA|HMMA)", text)]
    if not matrix:
        return 0
    return sum(bool(re.search(r"\b(STL|LDL)", text)) for _, text in lines[matrix[0] : matrix[-1]])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and stack bytes."""
    text = _disassemble("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources: {text}")
    return int(found.group(1)), int(found.group(2))


def weight_salience_report(
    capability: int, dtype: torch.dtype, config: TileConfig, *, coupled: bool, axis: str, want: int = 3,
    ones: Sequence[str] = (),
) -> Report:  # fmt: skip
    """One specialisation of the weight salience kernel; ``want`` orders are computed, integers in ``ones`` are 1.

    Triton makes constants of integer arguments that are 1, as on weights of a single row, unless a kernel says that
    it is not to.
    """
    specialised = {parameter.name for parameter in weight_salience_kernel.params if not parameter.do_not_specialize}
    kind = NAMES[dtype]
    pointers = dict.fromkeys(("p", "q", "w"), f"*{kind}") | {"blocks": "*i32", "partial": "*fp32"}
    integers = (
        "U", "R", "p_columns8", "q_columns8", "p_pitch8", "q_pitch8", "w_stride_u", "w_stride_r", "block_count",
        "plane",
    )  # fmt: skip
    signature = pointers | dict.fromkeys(integers, "i32") | {"scale": "fp32"}
    for operand, block in (("p", config.block_u), ("q", config.block_r)):
        name = f"{operand}_descriptor"
        signature[name] = f"tensordesc<{kind}[{config.block_t}, {block}]>" if config.descriptors else f"*{kind}"
    constants = {
        "ABS": 0, "SQUARE": 1 if want > 1 else -1, "MIXED": 2 if want > 2 else -1, "COUPLED": coupled,
        "DESCRIPTORS": config.descriptors, "EXACT_FP32": dtype == torch.float32, "BLOCK_U": config.block_u,
        "BLOCK_R": config.block_r, "BLOCK_T": config.block_t, "GROUP_U": 8,
        "w_stride_r" if axis == "out" else "w_stride_u": 1,
    } | {name: 1 for name in ones if name in specialised}  # fmt: skip
    divisible = {"p", "q", "w", "blocks", "partial", "U", "R", "plane", "w_stride_u", "w_stride_r"}
    if not config.descriptors:
        divisible |= {"p_descriptor", "q_descriptor"}
    tile = f"{config.block_u}x{config.block_r}x{config.block_t}, {config.warps} warps, {config.stages} stages"
    name = f"{'coupled' if coupled else 'weight'}_salience {axis} {kind} {tile}{' tma' if config.descriptors else ''}"
    return compile_kernel(
        name, weight_salience_kernel, capability, signature, constants, divisible, config.warps, config.stages,
        config.per_processor,
    )  # fmt: skip


def activation_report(
    capability: int, dtype: torch.dtype, planes: Sequence[str] = PLANES, shifted: bool = True
) -> Report:
    """One pass over x, and over dx for the salience: the sums of ``planes``."""
    kind = NAMES[dtype]
    signature = {"x": f"*{kind}", "dx": f"*{kind}", "shift": "*fp32", "blocks": "*i32", "partial": "*fp32"}
    signature |= dict.fromkeys(("K", "x_pitch", "dx_pitch", "plane"), "i32")
    constants = {name.upper(): planes.index(name) if name in planes else -1 for name in PLANES}
    constants |= {"SHIFTED": shifted, "BLOCK_K": triton_activations.BLOCK_K, "BLOCK_T": triton_activations.BLOCK_T}
    return compile_kernel(
        f"activation {'+'.join(planes)} {kind}", triton_activations.activation_sums_kernel, capability, signature,
        constants, set(signature), triton_activations.WARPS, 3,
    )  # fmt: skip


def sequence_report(capability: int) -> Report:
    """The second stage of the activation ops: blocks of each sequence added in order."""
    signature = {"partial": "*fp32", "starts": "*i32", "result": "*fp32"}
    signature |= dict.fromkeys(("K", "plane", "sequences"), "i32")
    constants = {"ABSMAX": 3, "BLOCK_K": triton_activations.FINISH_K}
    return compile_kernel(
        "activation sums of sequences", triton_activations.sequence_sums_kernel, capability, signature, constants,
        set(signature) - {"sequences"}, triton_activations.WARPS, 3,
    )  # fmt: skip


def reports() -> Iterator[Report]:
    """Every configuration that ``choose_config`` can pick, and every kind of activation op, for both capabilities."""
    for capability in (80, 90):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for lines, coupled in ((11008, False), (512, False), (4096, True)):
                config = choose_config(lines, 4096, dtype, coupled=coupled, processors=132, capability=capability)
                for axis in ("out", "in"):
                    yield weight_salience_report(capability, dtype, config, coupled=coupled, axis=axis)
            yield activation_report(capability, dtype)
            yield activation_report(capability, dtype, PLANES[:1], shifted=False)
            yield activation_report(capability, dtype, PLANES[1:4])
        yield sequence_report(capability)


def every_report() -> Iterator[Report]:
    """Of the calibration ops and of the inference ops."""
    from benchmarks.compile_inference import inference_reports  # which builds on this module

    yield from reports()
    for capability in (80, 90):
        yield from inference_reports(capability)


def main() -> None:
    counts = " ".join(f"{name:>6}" for name in COUNTED)
    print(f"triton {triton.__version__}\n{'kernel':66} {'':5} registers stack  shared {'per SM':15} {counts} spills")
    for report in every_report():
        print(report, flush=True)


if __name__ == "__main__":
    main()
