"""Short hashes of weights, equal wherever the weights are equal bit for bit."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

CHUNK_BYTES = 1 << 26  # of a tensor on a GPU, that come to the CPU at once


def frozen_fingerprint(model: nn.Module) -> str:
    """Of the parameters that do not require grad, and of all buffers: what a training run leaves as it is."""
    frozen = ((name, each) for name, each in model.named_parameters() if not each.requires_grad)
    return _hash([*frozen, *model.named_buffers()])


def weights_fingerprint(model: nn.Module) -> str:
    """Of all parameters and buffers."""
    return _hash([*model.named_parameters(), *model.named_buffers()])


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, len(flat), CHUNK_BYTES):
            digest.update(flat[start : start + CHUNK_BYTES].cpu().numpy().data)
    return digest.hexdigest()[:16]
