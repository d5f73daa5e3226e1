"""What safetensors files hold, by their headers alone, and whether it is all that a model needs, quantised or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from saap.families import family_of, layers_of
from saap.quantiser import SaapConfig
from saap.stored_form import StoredForm, is_left
from saap.stored_weight import METHOD, stored_shapes

EXPERTS = ".experts."  # in the names of their tensors, in files and in models
Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint stores the Linears of its decoder layers: ``config.json``'s quantization_config."""

    method: str
    bits: int
    group_size: int
    kept: tuple[str, ...]  # modules left as they were, by any end of their names

    @classmethod
    def of(cls, found: Any, source: Path) -> "Quantisation":
        """Read a quantization_config; ValueError for methods and values that are not known."""
        try:
            method = found["quant_method"]
            if method == METHOD:
                form = SaapConfig(**found).form
                bits, group, kept = form.bits, form.group_size, form.kept
            elif method == "compressed-tensors" and found["format"] == "pack-quantized":
                schemes = list(found["config_groups"].values())
                if len(schemes) != 1:
                    raise ValueError(f"{source}: expected one group in config_groups, got {len(schemes)}")
                (scheme,) = schemes
                bits, group = scheme["weights"]["num_bits"], scheme["weights"]["group_size"]
                kept = found.get("ignore") or ()
            else:
                raise ValueError(
                    f"{source}: expected quant_method {METHOD!r}, or 'compressed-tensors' in the format "
                    f"'pack-quantized', got {method!r}" + (f" in {found['format']!r}" if "format" in found else "")
                )
            if bits not in (4, 8) or not isinstance(group, int) or group < 1:
                raise ValueError(f"{source}: expected 4 or 8 bits in groups, got {bits!r} bits in groups of {group!r}")
            return cls(method, bits, group, tuple(map(str, kept)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source}: quantization_config lacks or misshapes {error}") from error

    def keeps(self, name: str) -> bool:
        """Whether the module ``name`` is left as it was."""
        return is_left(name, self.kept)

    def tensors(self, shape: tuple[int, int]) -> Shapes:
        """{name: shape} of what stands for a weight (N, K)."""
        rows, columns = shape
        if self.method == METHOD:
            return {name: list(size) for name, size in stored_shapes(shape, self.bits, self.group_size).items()}
        words = -(-columns * self.bits // 32)  # packed along a row into int32
        scales = [rows, -(-columns // self.group_size)]
        return {"weight_packed": [rows, words], "weight_scale": scales, "weight_shape": [2]}

    def __str__(self) -> str:
        method = "" if self.method == METHOD else f", {self.method} pack-quantized"
        return f"{StoredForm(self.bits, self.group_size)}{method}"


def check_weights(files: list[Path], model: PreTrainedModel, quantised: Quantisation | None) -> dict[str, int]:
    """Elements by dtype from the files' headers; refuses sizes that are not the configuration's.

    ``model`` is on the meta device and not quantised. The weights of the decoder layers must all be there.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = {} if any(EXPERTS in name for name in wanted) else _linears(model)
    if quantised is not None:
        needed, wanted = _stored(model, quantised, wanted)
    stored: dict[str, int] = {}
    in_experts, found = 0, set()
    for file in files:
        for name, shape, dtype in _headers(file):
            if name in wanted and shape != wanted[name]:
                raise ValueError(f"{file}: expected {name} of shape {wanted[name]}, got {shape}")
            found.add(name)
            stored[dtype] = stored.get(dtype, 0) + torch.Size(shape).numel()
            in_experts += torch.Size(shape).numel() if EXPERTS in name else 0
    prefix = f"{model.base_model_prefix}."  # files of a model without its head leave it out
    for name in needed:
        if name not in found and name.removeprefix(prefix) not in found:
            raise ValueError(f"{files[0].parent}: expected {name} of shape {wanted[name]}, found none")
    configured = sum(torch.Size(shape).numel() for name, shape in wanted.items() if EXPERTS in name)
    if in_experts != configured:  # stock files name experts one by one, the model has them in one tensor
        raise ValueError(f"{files[0].parent}: expected {configured:,} weights of experts, got {in_experts:,}")
    return stored


def _headers(file: Path) -> list[tuple[str, list[int], str]]:
    """(name, shape, dtype) of every tensor; ValueError for a file that is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            pieces = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  # not a mapping
            return [(name, piece.get_shape(), piece.get_dtype()) for name, piece in pieces.items()]
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def _linears(model: PreTrainedModel) -> Shapes:
    """{name: shape} of the weights of every Linear in the decoder layers."""
    path = family_of(model).layers
    return {
        f"{path}.{name}.weight": list(module.weight.shape)
        for name, module in layers_of(model, family_of(model)).named_modules()
        if isinstance(module, nn.Linear)
    }


def _stored(model: PreTrainedModel, quantised: Quantisation, wanted: Shapes) -> tuple[Shapes, Shapes]:
    """What must be there, and the shapes of all that may, when the layers' Linears are stored quantised."""
    needed, wanted = {}, dict(wanted)
    for name, shape in _linears(model).items():
        module = name.removesuffix(".weight")
        if quantised.keeps(module) or 0 in shape:  # nothing is left of it
            needed[name] = shape
            continue
        del wanted[name]
        rows, columns = shape
        needed |= {f"{module}.{kind}": size for kind, size in quantised.tensors((rows, columns)).items()}
    return needed, wanted | needed
