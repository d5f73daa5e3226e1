"""What the Triton compiler makes of the inference kernels: the rows that ``benchmarks.compile_report`` adds."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from benchmarks.compile_report import NAMES, Report, compile_kernel
from saap_kernels.triton_config import FINISH_N, WHOLE_ROW, LinearConfig, Problem, choose_config
from saap_kernels.triton_gated import gated_finish_kernel, gated_kernel
from saap_kernels.triton_linear import linear_finish_kernel, linear_kernel

STORED = {8: "i8", 4: "u8"}
FEW, MANY = 1, 2048  # tokens


def inference_report(
    capability: int, dtype: torch.dtype, bits: int, tokens: int, *, gated: bool = False, group: int = 128,
    rows: int = 11008, columns: int = 4096, aligned: bool = True, config: LinearConfig | None = None,
) -> Report:  # fmt: skip
    """One specialisation of the linear or the gated kernel; ``aligned``: N and the pitch of x are multiples of 8."""
    group = WHOLE_ROW if bits == 16 else group
    config = config or choose_config(Problem(tokens, rows, columns, bits, group, dtype, gated, 132, capability))
    kernel, split = gated_kernel if gated else linear_kernel, config.splits > 1
    kind, unit = NAMES[dtype], 8 if aligned else 1
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= dict.fromkeys(("x", "scales", "zeros", "bias"), f"*{kind}")
    signature |= {"data": f"*{STORED.get(bits, kind)}", "out": "*fp32" if split else f"*{kind}"}
    constants: dict[str, Any] = {
        "BITS": bits, "BIAS": True, "SPLIT": split, "GROUP": group, "STREAM": tokens <= config.block_t,
        "EXACT": dtype == torch.float32, "X_UNIT": unit, "BLOCK_T": config.block_t, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    } | ({"GELU": True} if gated else {"N_UNIT": unit})  # fmt: skip
    divisible = {"x", "data", "scales", "zeros", "bias", "out", "rows", "pitch"}
    tile = f"{config.block_t}x{config.block_n}x{config.block_k}, {config.warps} warps, {config.stages} stages"
    name = f"{'gated' if gated else 'linear'} {bits} bits {kind} {tile}{' split' * split}{' odd' * (not aligned)}"
    return compile_kernel(name, kernel, capability, signature, constants, divisible, config.warps, config.stages)


def finish_report(capability: int, *, gated: bool) -> Report:
    """The second stage of a split product: the sums of all splits added in order."""
    kernel = gated_finish_kernel if gated else linear_finish_kernel
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"partial": "*fp32", "bias": "*bf16", "out": "*bf16"}
    constants = {"BIAS": True, "BLOCK_N": FINISH_N} | ({"GELU": True} if gated else {})
    divisible = {"partial", "bias", "out", "rows", "plane"}
    name = f"{'gated' if gated else 'linear'} sums of splits"
    return compile_kernel(name, kernel, capability, signature, constants, divisible, 4, 3)


def inference_reports(capability: int) -> Iterator[Report]:
    """Every kind of tile that ``choose_config`` picks: split and whole, and of groups of 32 in fp16."""
    for gated in (False, True):
        for bits, tokens in product((16, 8, 4), (FEW, MANY)):
            yield inference_report(capability, torch.bfloat16, bits, tokens, gated=gated)
        yield inference_report(capability, torch.bfloat16, 16, FEW, gated=gated, rows=65536)
        yield inference_report(capability, torch.float32, 4, FEW, gated=gated)
        yield inference_report(capability, torch.float16, 8, FEW, gated=gated, group=32)
        yield finish_report(capability, gated=gated)
    yield inference_report(capability, torch.float16, 4, FEW, group=32)
    yield inference_report(capability, torch.bfloat16, 16, MANY, aligned=False)
