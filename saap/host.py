"""Results on their way from a device to the CPU: many in one transfer, because each one waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` as float64 on the CPU, by one transfer from each device that they lie on."""
    result = [tensor.double() for tensor in tensors]
    for device in {tensor.device for tensor in result} - {CPU}:
        places = [place for place, tensor in enumerate(result) if tensor.device == device]
        moved = _transfer(torch.cat([result[place].flatten() for place in places]))
        pieces = moved.split([result[place].numel() for place in places])
        for place, piece in zip(places, pieces, strict=True):
            result[place] = piece.view(result[place].shape)
    return result


def _transfer(packed: Tensor) -> Tensor:
    """To page-locked memory, from which torch's allocator serves the next transfer too, where CUDA has it."""
    if not packed.is_cuda:
        return packed.cpu()
    host = packed.to(CPU, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return host
