"""Write a model with int4 weights in the compressed-tensors format, which transformers and vLLM load."""

import os


def export_compressed_tensors(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, group_size: int = 32, force: bool = False
) -> None:
    """Write the model directory ``path`` as the directory ``out``, format pack-quantized."""
    raise NotImplementedError
