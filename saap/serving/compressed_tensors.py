"""Write a model with int4 weights in the compressed-tensors format, which transformers and vLLM load.

Format pack-quantized: symmetric int4, one scale for each group of a row. vLLM's Marlin kernels take zero points too,
but those are packed along the rows, whose number is any after pruning; without them every width that the groups divide
will do.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saap.card import CARD_FILE, model_card
from saap.checkpoint import load, written_whole
from saap.checkpoint_files import PLAN_FILE, plan_in
from saap.families import family_of, is_mixture
from saap.opening import open_tokenizer
from saap.quantise import Progress, calibration_ids, check_export, made_by, round_linears
from saap.quantised_linear import QuantisedLinear
from saap.quantiser import SaapConfig, linears_to_quantise
from saap.refuse import refuse_nonfinite_weights, refuse_unsupported
from saap.stored_weight import NAMES
from saap.units import discover
from saap.version import __version__

BITS = 4


def export_compressed_tensors(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    group_size: int = 32,
    rounding: str = "nearest",
    data: Any = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the model directory ``path`` as the directory ``out``, format pack-quantized.

    Every Linear of the decoder layers becomes int4 in groups of ``group_size`` (32, 64 or 128), which must divide its
    in_features; the rest stays. The tokenizer and the plan go along. ``rounding`` and its text are those of
    ``saap.quantise``, here with steps around zero. ``progress(done, total)`` counts Linears.

    Raises ValueError, before any work, for groups that do not fit, mixtures of experts, quantised models and weights
    that are not finite, FileExistsError or FileNotFoundError for paths, and RuntimeError where the library is missing.
    """
    if find_spec("compressed_tensors") is None:
        raise RuntimeError("compressed-tensors is not installed: pip install 'saap[compressed-tensors]'")
    check_export(path, out, BITS, group_size, rounding, data, force)
    target, model = Path(out), load(path)
    linears = _linears(model, group_size)
    plan, tokenizer = plan_in(Path(path)), open_tokenizer(os.fspath(path))
    units = discover(model)
    if rounding == "nearest":
        state = _compressed_state(model, linears, group_size, progress)
    else:
        ids = calibration_ids(model, rounding, tokenizer, data, samples, seq_len, seed)
        config = SaapConfig(bits=BITS, group_size=group_size)
        round_linears(model, linears, config, rounding, ids, progress, symmetric=True)
        state = _state_of_rounded(model, linears, group_size)
    model.config.quantization_config = _config(model, linears, group_size)
    with written_whole(target) as folder:
        model.save_pretrained(folder, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if plan is not None:
            plan.save(folder / PLAN_FILE)
        card = model_card(model, units, plan, __version__, made_by(model, path, rounding, data, samples, seq_len))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _linears(model: PreTrainedModel, group_size: int) -> dict[str, nn.Linear]:
    """What becomes int4, or ValueError."""
    refuse_unsupported(model)
    if is_mixture(model):
        raise ValueError(
            "mixtures of experts are not exported as compressed-tensors: their experts would stay as they are, which "
            "vLLM does not expect; --quantised int4 writes them for transformers"
        )
    linears = linears_to_quantise(model, SaapConfig(bits=BITS, group_size=group_size))
    for name, linear in linears.items():
        if linear.in_features % group_size:
            raise ValueError(
                f"{name}: expected in_features to be a multiple of the group size {group_size}, got "
                f"{linear.in_features}; prune with --multiple {group_size}, or use --quantised int4, whose last group "
                "may be shorter"
            )
    refuse_nonfinite_weights(model, family_of(model))
    return linears


def _scheme(group_size: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=group_size)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _config(model: PreTrainedModel, linears: dict[str, nn.Linear], group_size: int) -> dict[str, Any]:
    """The quantization_config of config.json, as the library's own writer makes it."""
    from compressed_tensors.quantization import QuantizationConfig

    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    config = QuantizationConfig(
        config_groups={"group_0": _scheme(group_size)},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=sorted({"lm_head", *left}),
    )
    return config.model_dump(mode="json") | {"quant_method": "compressed-tensors"}


@torch.no_grad()
def _compressed_state(
    model: PreTrainedModel, linears: dict[str, nn.Linear], group_size: int, progress: Progress | None
) -> dict[str, Tensor]:
    """The state dict with packed weights, each rounded to the nearest step, in place of those of ``linears``."""
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme, state = _scheme(group_size), model.state_dict()
    for done, name in enumerate(linears):
        weight = state.pop(f"{name}.weight")
        groups = weight.float().unflatten(-1, (-1, group_size))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        state |= _packed(name, weight, scale.to(weight.dtype), group_size)
        if progress is not None:
            progress(done + 1, len(linears))
    return state


@torch.no_grad()
def _state_of_rounded(model: PreTrainedModel, linears: dict[str, nn.Linear], group_size: int) -> dict[str, Tensor]:
    """As ``_compressed_state``, of Linears that are quantised in steps around zero: the same levels."""
    state = model.state_dict()
    for name, module in linears.items():
        assert isinstance(module, QuantisedLinear)
        _, scale, _ = (state.pop(f"{name}.{each}") for each in NAMES)
        state |= _packed(name, module.unpacked_weight(), scale, group_size)
    return state


def _packed(name: str, weight: Tensor, scale: Tensor, group_size: int) -> dict[str, Tensor]:
    """The format's tensors of one weight (N, K) and the scales (N, G) of its groups."""
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    local = {"weight": weight, "weight_scale": scale, "weight_zero_point": torch.zeros_like(scale)}
    packed = compressor.compress(local, _scheme(group_size))
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in packed.items()}
