"""Estimates of the memory that calibration needs, and how much a device has left."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from saap.determinism import ask_cublas
from saap.units import LayerUnits, Units


def activation_bytes(units: Units, tokens: int, dtype: torch.dtype) -> int:
    """Bytes autograd keeps for ``tokens`` tokens of a micro-batch.

    Per token and layer: residual stream, norms and their outputs (about 8 hidden sizes), q, k, v,
    rotated q and k and the attention output, and four tensors of the MLP's width; of experts, for each that the
    token goes through, and two of the hidden size.
    """
    return sum(map(_kept_per_token, units.layers)) * tokens * dtype.itemsize


def block_activation_bytes(units: Units, tokens: int, dtype: torch.dtype) -> int:
    """``activation_bytes`` of the largest decoder block."""
    return max(map(_kept_per_token, units.layers)) * tokens * dtype.itemsize


def checkpointed_bytes(units: Units, tokens: int, dtype: torch.dtype) -> int:
    """As ``activation_bytes`` when blocks are recomputed: their inputs, and one block's activations."""
    inputs = sum(layer.hidden_size for layer in units.layers) * tokens * dtype.itemsize
    return inputs + block_activation_bytes(units, tokens, dtype)


def _kept_per_token(layer: LayerUnits) -> int:
    heads = (3 * layer.query_heads + 3 * layer.kv_heads) * layer.head_dim
    routed = layer.experts_per_token
    return (8 + 2 * routed) * layer.hidden_size + heads + 4 * max(1, routed) * layer.intermediate_size


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def available_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, with what torch holds unused there, or of the machine for any other device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")  # counts reclaimable page cache as available, unlike sysconf
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move the model to the current CUDA device if there is one and the weights leave a tenth of it free."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if weight_bytes(model) < 0.9 * available_bytes(device):
            ask_cublas()  # before the first product there
            return model.to(device)  # type: ignore[arg-type]  # stubs of to() know no torch.device
    return model
