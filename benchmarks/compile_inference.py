"""What the Triton compiler makes of the inference kernels: the rows that ``benchmarks.compile_report`` adds."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.compile_report import NAMES, Report, compile_kernel
from saap_kernels.triton_config import LinearConfig, Problem, choose_config
from saap_kernels.triton_linear import linear_kernel

STORED = {8: "i8", 4: "u8"}
FEW, MANY = 1, 2048  # tokens


def inference_report(
    capability: int, dtype: torch.dtype, bits: int, tokens: int, *, group: int = 128, rows: int = 11008,
    columns: int = 4096, aligned: bool = True, gated: bool = False, processors: int = 132, config: LinearConfig | None = None,
) -> Report:  # fmt: skip
    """One specialisation of the linear or the gated kernel; ``aligned``: pitch of x and rows are multiples of 8."""
    group = 0 if bits == 16 else group
    problem = Problem(tokens, rows, columns, bits, group, dtype, gated, processors)
    config = config or choose_config(problem)
    kernel = linear_kernel
    kind = NAMES[dtype]
    signature: dict[str, str] = dict.fromkeys(kernel.arg_names, "i32")
    signature |= dict.fromkeys(("x", "scales", "zeros", "bias", "out"), f"*{kind}")
    signature["data"] = f"*{STORED.get(bits, kind)}"
    if config.splits > 1:
        signature["out"] = "*fp32"
    unit = 8 if aligned else 1
    constants: dict[str, Any] = {
        "BITS": bits, "BIAS": True, "SPLIT": config.splits > 1, "SPLIT_GROUPS": bits == 4 and group % 64 != 0,
        "STREAM": tokens <= config.block_t, "EXACT": dtype == torch.float32, "N_UNIT": unit, "X_UNIT": unit,
        "BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    divisible = {"x", "data", "scales", "zeros", "bias", "out", "rows", "pitch"}
    tile = f"{config.block_n}x{config.block_t}x{config.block_k}, {config.warps} warps, {config.stages} stages"
    split = " split" if config.splits > 1 else ""
    name = f"{'gated' if gated else 'linear'} {bits} bits {kind} {tile}{split}{'' if aligned else ' odd'}"
    return compile_kernel(name, kernel, capability, signature, constants, divisible, config.warps, config.stages)


def inference_reports(capability: int) -> Iterator[Report]:
    for bits in (16, 8, 4):
        for tokens in (FEW, MANY):
            yield inference_report(capability, torch.bfloat16, bits, tokens)


if __name__ == "__main__":
    for capability in (90, 80):
        for report in inference_reports(capability):
            print(report, flush=True)
