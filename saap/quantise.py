"""Quantise a model's projections in groups: in place, saved as checkpoints of quant_method "saap"."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap import distributed
from saap.calibrate import check_sizes
from saap.card import Made, recovery_in, told_name
from saap.checkpoint import load, refuse_existing, refuse_losing, save
from saap.checkpoint_files import plan_in
from saap.data import load_documents, pack_for
from saap.families import family_of
from saap.gptq_sweep import QuantisingSweep
from saap.opening import open_tokenizer
from saap.quantiser import ROUNDINGS, SaapConfig, SaapQuantizer, check_bits, linears_to_quantise, quantise_linear
from saap.refuse import refuse_meta, refuse_nonfinite_weights, refuse_unsupported
from saap.stream import resolve_streaming
from saap.units import discover

Progress = Callable[[int, int], Any]


@torch.inference_mode(False)
@torch.no_grad()
def quantise(
    model: PreTrainedModel,
    *,
    bits: int,
    group_size: int = 32,
    rounding: str = "nearest",
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Quantise the Linears of a dense or pruned ``model``'s decoder layers to ``bits`` 8 or 4, in place.

    Each ``group_size`` (32, 64 or 128) consecutive weights of a row share scale and zero, W = scale * Q + zero; the
    last group of a row may be shorter. Embeddings, norms, the output head, experts and routers stay: of a mixture only
    attention is quantised. One weight at a time goes, so that memory never holds two models; ``progress(done, total)``
    counts Linears. The result saves with ``saap.save`` or ``save_pretrained`` and is returned.

    ``rounding`` "nearest" spreads a group's steps from its least to its largest weight, "clip" over the part of that
    range that loses least in squares (``saap.clip_search``). "gptq" keeps the Linears' outputs on calibration text
    instead: columns are rounded one after another, each making up for those before it (``saap.gptq``), block by block
    on the inputs that the blocks quantised so far give. Its text is ``data``, read as ``calibrate`` does into
    ``samples`` sequences of ``seq_len`` tokens, or a tensor of token ids (sequences, length), of whose rows it takes
    the first ``samples`` as they are. Beyond the model, memory holds hidden states on the host and one block's Gram
    matrices in float64, which are summed over the ranks of a torch.distributed group.

    Raises ValueError, with nothing changed, for other ``bits``, groups and roundings, models of unknown families,
    quantised, PEFT-wrapped or accelerated ones, weights on the meta device, weights that are not finite, and text that
    is missing, too short, or given without use. Only what "gptq" meets on its way, hidden states that are not finite
    and weights that outgrow their dtype, leaves a model whose blocks up to there are quantised: load it again.
    """
    check_bits(bits, group_size)
    check_rounding(rounding, data)
    refuse_unsupported(model)
    family = family_of(model)
    left = ["lm_head"] + ([] if family.router is None else [family.router.rpartition(".")[2]])
    config = SaapConfig(bits=bits, group_size=group_size, modules_to_not_convert=left)
    linears = linears_to_quantise(model, config)
    refuse_meta(model)
    refuse_nonfinite_weights(model, family)
    _refuse_too_wide(linears)
    ids = calibration_ids(model, rounding, tokenizer, data, samples, seq_len, seed)
    round_linears(model, linears, config, rounding, ids, progress)
    _describe(model, config)
    return model


def check_rounding(rounding: str, data: Any) -> None:
    """Raise ValueError for a rounding that does not exist, that lacks its text, or that has no use for text."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if rounding == "gptq" and data is None:
        raise ValueError("rounding gptq needs calibration text: expected data (--data), got none")
    if rounding != "gptq" and data is not None:
        raise ValueError(f"rounding {rounding} reads no text: expected no data (--data) beside it; gptq does")


def check_text(data: Any) -> None:
    """Read ``data`` where it names a file, so that its errors come before a model is loaded."""
    if isinstance(data, str | os.PathLike):
        load_documents(data)


def calibration_ids(
    model: PreTrainedModel, rounding: str, tokenizer: PreTrainedTokenizerBase | None, data: Any, samples: int,
    seq_len: int, seed: int = 0,
) -> Tensor | None:  # fmt: skip
    """This rank's sequences (N, T) for ``round_linears``; None where ``rounding`` reads none."""
    if rounding != "gptq":
        return None
    if isinstance(data, Tensor) and data.ndim == 2:
        samples, seq_len = min(samples, len(data)), data.shape[1]
    check_sizes(model, samples, seq_len, "auto")
    return distributed.share(pack_for(model, tokenizer, data, samples=samples, seq_len=seq_len, seed=seed))


def round_linears(
    model: PreTrainedModel, linears: dict[str, nn.Linear], config: SaapConfig, rounding: str, ids: Tensor | None,
    progress: Progress | None, symmetric: bool = False,
) -> None:  # fmt: skip
    """Make ``linears`` quantised ones, see ``quantise``; ``symmetric`` as of ``saap.gptq.quantise_weight``."""
    if ids is not None:
        streaming = resolve_streaming(model, "auto")
        sweep = QuantisingSweep(model, discover(model), linears, config, ids, streaming, symmetric, progress)
        with sweep.walking():
            sweep.run()
        return
    for done, (name, module) in enumerate(linears.items()):
        quantise_linear(module, f"{name}.weight", config, clip=rounding == "clip", symmetric=symmetric)
        if progress is not None:
            progress(done + 1, len(linears))


def export_quantised(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int,
    group_size: int = 32,
    rounding: str = "nearest",
    data: Any = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the model directory ``path`` as the directory ``out`` with quantised projections, see ``quantise``.

    The tokenizer, which reads ``data`` too, and the plan go along; the model card says how the weights are stored and
    were rounded. Raises ValueError, FileNotFoundError or FileExistsError before any weight is read where arguments,
    paths or files of text do not fit.
    """
    check_export(path, out, bits, group_size, rounding, data, force)
    model = load(path)
    tokenizer = open_tokenizer(os.fspath(path)) if rounding == "gptq" else None
    quantise(
        model, bits=bits, group_size=group_size, rounding=rounding, tokenizer=tokenizer, data=data, samples=samples,
        seq_len=seq_len, seed=seed, progress=progress,
    )  # fmt: skip
    save_beside(model, path, out, force, made_by(model, path, rounding, data, samples, seq_len))


def check_export(
    path: str | os.PathLike[str], out: str | os.PathLike[str], bits: int, group_size: int, rounding: str, data: Any,
    force: bool,
) -> None:  # fmt: skip
    """Raise for arguments, paths or files of text of an export that do not fit, before a weight is read."""
    check_bits(bits, group_size)
    check_rounding(rounding, data)
    refuse_existing(Path(out), force)
    refuse_losing(out, {"model": path, "calibration text": data})
    check_text(data)


def save_beside(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    force: bool,
    made: Made | None = None,
) -> None:
    """Save ``model``, made from the directory ``path``, with that one's tokenizer and plan."""
    save(model, out, tokenizer=open_tokenizer(os.fspath(path)), force=force, plan=plan_in(Path(path)), made=made)


def made_by(
    model: PreTrainedModel, path: str | os.PathLike[str], rounding: str, data: Any, samples: int, seq_len: int
) -> Made:
    """What the card tells of how the weights of the directory ``path`` were rounded, and tuned before if they were."""
    counted = rounding == "gptq" and not isinstance(data, Tensor)  # a tensor has sizes of its own
    text = f", on {samples} sequences of {seq_len} tokens" if counted else ""
    named = f" of {told_name(os.fspath(data))}" if isinstance(data, str | os.PathLike) else ""
    return Made(base=model.name_or_path, rounding=f"{rounding}{text}{named}", **recovery_in(Path(path)))


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
