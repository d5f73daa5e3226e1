"""An OpenAI-compatible server for pruned models, on transformers' own serving code."""

import os


def serve(path: str | os.PathLike[str], *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve the model directory ``path`` until interrupted."""
    raise NotImplementedError
