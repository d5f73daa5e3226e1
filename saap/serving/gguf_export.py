"""Write a model as one GGUF file that llama.cpp runs."""

import os
from pathlib import Path

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1")


def export_gguf(path: str | os.PathLike[str], out: str | os.PathLike[str], type: str, *, force: bool = False) -> Path:
    """Write the model directory ``path`` as the GGUF file ``out``, weights of ``type``."""
    raise NotImplementedError
