"""Quantise a model's projections in groups: in place, saved as checkpoints of quant_method "saap"."""

import os

from transformers import PreTrainedModel


def quantise(model: PreTrainedModel, *, bits: int, group_size: int = 32) -> PreTrainedModel:
    """Replace the decoder layers' Linears by quantised ones, in place."""
    raise NotImplementedError


def export_quantised(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, bits: int, group_size: int = 32, force: bool = False
) -> None:
    """Write the model directory ``path`` as the directory ``out`` with quantised projections."""
    raise NotImplementedError
