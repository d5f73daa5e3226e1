"""Quantise a model's projections in groups: in place, saved as checkpoints of quant_method "saap"."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.checkpoint import PLAN_FILE, load, refuse_existing, save
from saap.families import family_of
from saap.opening import open_tokenizer
from saap.plan import Plan
from saap.quantiser import SaapConfig, SaapQuantizer, check_bits, linears_to_quantise, quantise_linear
from saap.refuse import refuse_meta, refuse_nonfinite_weights, refuse_unsupported

Progress = Callable[[int, int], Any]


@torch.inference_mode(False)
@torch.no_grad()
def quantise(
    model: PreTrainedModel, *, bits: int, group_size: int = 32, progress: Progress | None = None
) -> PreTrainedModel:
    """Quantise the Linears of a dense or pruned ``model``'s decoder layers to ``bits`` 8 or 4, in place.

    Each ``group_size`` (32, 64 or 128) consecutive weights of a row share scale and zero, W = scale * Q + zero with
    even steps from their least to their largest; the last group of a row may be shorter. Embeddings, norms, the output
    head, experts and routers stay: of a mixture only attention is quantised. One weight at a time goes, so that memory
    never holds two models; ``progress(done, total)`` counts Linears. The result saves with ``saap.save`` or
    ``save_pretrained`` and is returned.

    Raises ValueError, with nothing changed, for other ``bits`` and groups, models of unknown families, quantised,
    PEFT-wrapped or accelerated ones, weights on the meta device, and weights that are not finite.
    """
    check_bits(bits, group_size)
    refuse_unsupported(model)
    family = family_of(model)
    left = ["lm_head"] + ([] if family.router is None else [family.router.rpartition(".")[2]])
    config = SaapConfig(bits=bits, group_size=group_size, modules_to_not_convert=left)
    linears = linears_to_quantise(model, config)
    refuse_meta(model)
    refuse_nonfinite_weights(model, family)
    _refuse_too_wide(linears)
    for done, (name, module) in enumerate(linears.items()):
        quantise_linear(module, f"{name}.weight", config)
        if progress is not None:
            progress(done + 1, len(linears))
    _describe(model, config)
    return model


def export_quantised(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int,
    group_size: int = 32,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the model directory ``path`` as the directory ``out`` with quantised projections, see ``quantise``.

    The tokenizer and the plan go along, the model card says how the weights are stored. Raises ValueError,
    FileNotFoundError or FileExistsError before any weight is read where arguments or paths do not fit.
    """
    check_bits(bits, group_size)
    refuse_existing(Path(out), force)
    if Path(out).resolve() == Path(path).resolve():
        raise ValueError(f"{out} is the model itself; expected another directory: its weights would be lost")
    model = load(path)
    quantise(model, bits=bits, group_size=group_size, progress=progress)
    save_beside(model, path, out, force)


def save_beside(model: PreTrainedModel, path: str | os.PathLike[str], out: str | os.PathLike[str], force: bool) -> None:
    """Save ``model``, made from the directory ``path``, with that one's tokenizer and plan."""
    plan_file = Path(path) / PLAN_FILE
    plan = Plan.load(plan_file) if plan_file.is_file() else None
    save(model, out, tokenizer=open_tokenizer(os.fspath(path)), force=force, plan=plan)


def _refuse_too_wide(linears: dict[str, nn.Linear]) -> None:
    """Weights whose range could overflow their dtype: ``pack`` would refuse them when others are quantised already."""
    for name, module in linears.items():
        largest = float(module.weight.abs().max())
        if largest > torch.finfo(module.weight.dtype).max / 2:
            raise ValueError(f"{name}.weight: expected weights whose range fits its dtype, got up to {largest:.3g}")


def _describe(model: PreTrainedModel, config: SaapConfig) -> None:
    """What transformers keeps of a model that it has loaded quantised."""
    quantizer = SaapQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, config.quant_method
    quantizer.postprocess_model(model)
