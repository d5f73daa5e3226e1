"""Short hashes of weights, equal wherever the weights are equal bit for bit."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

CHUNK_BYTES = 1 << 25


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
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor.detach())};".encode())
    return digest.hexdigest()[:16]


def _checksum(tensor: Tensor) -> tuple[int, int]:
    """Sums, modulo 2^64, of a tensor's bytes and of each times its place, taken where the tensor is.

    Sums of integers depend neither on their order nor on the device; a 14 GB model need not come to the CPU.
    """
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), CHUNK_BYTES):
        part = flat[start : start + CHUNK_BYTES]
        words = _words(part)
        place = torch.arange(start, start + len(words), device=flat.device) * 2 + 1
        total += torch.stack([words.sum(), (words * place).sum()])
    return int(total[0]), int(total[1])


def _words(part: Tensor) -> Tensor:
    """Bytes as int64, eight to one, the last filled up with zeros."""
    whole = nn.functional.pad(part, (0, -len(part) % 8))
    return (whole if whole.storage_offset() % 8 == 0 else whole.clone()).view(torch.int64)
