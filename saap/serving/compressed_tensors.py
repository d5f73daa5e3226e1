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

from saap.card import model_card
from saap.checkpoint import PLAN_FILE, load, refuse_existing, written_whole
from saap.families import family_of, is_mixture
from saap.opening import open_tokenizer
from saap.plan import Plan
from saap.quantise import Progress
from saap.quantiser import SaapConfig, check_bits, linears_to_quantise
from saap.refuse import refuse_nonfinite_weights, refuse_unsupported
from saap.units import discover
from saap.version import __version__

BITS = 4


def export_compressed_tensors(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    group_size: int = 32,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the model directory ``path`` as the directory ``out``, format pack-quantized.

    Every Linear of the decoder layers becomes int4 in groups of ``group_size`` (32, 64 or 128), which must divide its
    in_features; the rest stays. The tokenizer and the plan go along. Weights are rounded to the nearest step.
    ``progress(done, total)`` counts Linears.

    Raises ValueError, before any work, for groups that do not fit, mixtures of experts, quantised models and weights
    that are not finite, FileExistsError or FileNotFoundError for paths, and RuntimeError where the library is missing.
    """
    if find_spec("compressed_tensors") is None:
        raise RuntimeError("compressed-tensors is not installed: pip install 'saap[compressed-tensors]'")
    check_bits(BITS, group_size)
    target = Path(out)
    refuse_existing(target, force)
    if target.resolve() == Path(path).resolve():
        raise ValueError(f"{target} is the model itself; expected another directory: its weights would be lost")
    model = load(path)
    linears = _linears(model, group_size)
    plan_file, tokenizer = Path(path) / PLAN_FILE, open_tokenizer(os.fspath(path))
    plan = Plan.load(plan_file) if plan_file.is_file() else None
    units = discover(model)
    state = _compressed_state(model, linears, group_size, progress)
    model.config.quantization_config = _config(model, linears, group_size)
    with written_whole(target) as folder:
        model.save_pretrained(folder, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if plan is not None:
            plan.save(folder / PLAN_FILE)
        (folder / "README.md").write_text(model_card(model, units, plan, __version__), encoding="utf-8")


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
    """The state dict with packed weights in place of those of ``linears``."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    compressor, scheme = BaseCompressor.get_value_from_registry("pack-quantized"), _scheme(group_size)
    state = model.state_dict()
    for done, name in enumerate(linears):
        weight = state.pop(f"{name}.weight")
        groups = weight.float().unflatten(-1, (-1, group_size))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        local = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
        packed = compressor.compress(local, scheme)
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in packed.items()}
        if progress is not None:
            progress(done + 1, len(linears))
    return state
