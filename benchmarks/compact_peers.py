"""What benchmarks.compact_gemm compares: the ops on packed weights, and what else would run a pruned MLP's products."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import saap_kernels as K
from benchmarks.compact_widths import Mlp
from benchmarks.timing import Rates, Variant
from saap_kernels.packed import LINE, round_up

OPS = ("gated_mlp", "up", "down")
PEERS = ("F.linear", "F.linear padded", "compiled", "Liger", "torchao")
ROTATED_BYTES = 256 << 20  # of operand sets together, past any cache
ABSENT = (ImportError, AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Product:
    """One op on an MLP: "up" is x (T, D) by (F, D), "down" h (T, F) by (D, F), "gated_mlp" all three products."""

    op: str
    mlp: Mlp
    tokens: int
    bits: int

    @property
    def case(self) -> str:
        stored = "" if self.bits == 16 else f" int{self.bits}"
        return f"{self.op}{stored} {self.mlp.case}, {self.tokens} tokens"

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        up, down = (self.mlp.width, self.mlp.hidden), (self.mlp.hidden, self.mlp.width)
        return {"up": (up,), "down": (down,), "gated_mlp": (up, up, down)}[self.op]

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def flops(self) -> float:
        return 2.0 * self.tokens * self.weights

    def read_bytes(self, size: int) -> float:
        """Of the weights as stored, ``size`` bytes each for 16 bits; scales and zeros of int8 and int4 included."""
        stored = size if self.bits == 16 else self.bits / 8 + 2 * size / 128
        return self.weights * stored


class Operands:
    """One set of weights and inputs, in every form that a variant takes."""

    def __init__(self, product: Product, rates: Rates, generator: torch.Generator) -> None:
        def drawn(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=rates.device).to(rates.dtype)

        self.odd = tuple(drawn(*shape) / shape[1] ** 0.5 for shape in product.shapes)
        self.padded = tuple(K.pack(weight).data for weight in self.odd)
        self.x = drawn(product.tokens, product.shapes[0][1])
        self.padded_x = functional.pad(self.x, (0, round_up(self.x.shape[1], LINE) - self.x.shape[1]))
        if product.op == "gated_mlp":
            self.packed = (K.pack(torch.stack(self.odd[:2]), bits=product.bits), K.pack(self.odd[2], bits=product.bits))
        else:
            self.packed = (K.pack(self.odd[0], bits=product.bits),)


def mlp_of(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The gated MLP as models write it."""
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def liger_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Three products of the library around Liger-Kernel's fused SiLU and product."""
    fused = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return functional.linear(fused.apply(functional.linear(x, gate), functional.linear(x, up)), down)


@cache
def compiled(op: str) -> Callable[..., Any]:
    """By torch.compile for each shape anew; our own graphs take the place of its."""
    torch._dynamo.config.cache_size_limit = 1024  # one entry per shape
    form = mlp_of if op == "gated_mlp" else functional.linear
    return torch.compile(form, mode="max-autotune-no-cudagraphs", dynamic=False)


def torchao_linears(product: Product, operands: Operands) -> tuple[torch.nn.Module, ...]:
    """Padded Linears with torchao's weight-only int8 or int4 (groups of 128)."""
    quantization = import_module("torchao.quantization")
    configs = {
        8: lambda: quantization.Int8WeightOnlyConfig(),
        4: lambda: quantization.Int4WeightOnlyConfig(group_size=128),
    }
    linears = []
    for weight in operands.padded:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantization.quantize_(linear, configs[product.bits]())
        linears.append(linear)
    return tuple(linears)


def variants_of(
    product: Product, sets: list[Operands], chosen: tuple[str, ...]
) -> tuple[dict[str, Variant], list[str]]:
    """{"ours" or peer: call on operand set i}, and a note for every peer that is not here."""
    gated, notes = product.op == "gated_mlp", []
    form = mlp_of if gated else functional.linear
    found: dict[str, Variant] = {"ours": lambda i: ours(product, sets[i])}
    if "F.linear" in chosen:
        found["F.linear"] = lambda i: form(sets[i].x, *sets[i].odd)
    if "F.linear padded" in chosen:
        found["F.linear padded"] = lambda i: form(sets[i].padded_x, *sets[i].padded)
    if "compiled" in chosen:
        found["compiled"] = lambda i: compiled(product.op)(sets[i].x, *sets[i].odd)
    if "Liger" in chosen and gated:
        found["Liger"] = lambda i: liger_mlp(sets[i].padded_x, *sets[i].padded)
    if "torchao" in chosen and product.bits != 16 and not gated:
        try:
            linears = [torchao_linears(product, each) for each in sets]
        except ABSENT as error:
            notes.append(f"torchao: {error}")
        else:
            found["torchao"] = lambda i: linears[i][0](sets[i].padded_x)
    for name in ("Liger", "torchao", "compiled"):
        if name in found:
            try:
                found[name](0)
            except ABSENT as error:
                del found[name]
                notes.append(f"{name}: {str(error).splitlines()[0]}")
    return found, notes


def ours(product: Product, operands: Operands) -> Tensor:
    if product.op == "gated_mlp":
        return K.gated_mlp(operands.x, *operands.packed, activation="silu")
    return K.linear(operands.x, operands.packed[0])
