"""What a directory's quantization_config says, and how ``saap.load`` takes the weights that it describes."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from saap.stored_weight import METHOD
from saap.weight_headers import Quantisation

COMPRESSED = "compressed-tensors"


def described_in(folder: Path) -> dict[str, Any] | None:
    """The quantization_config of a model directory, or None.

    Raises ValueError for a quant_method that transformers does not know, and would ignore, and RuntimeError naming
    what is to be installed for one that it knows.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described = config.get("quantization_config")
    if described is None:
        return None
    method = described.get("quant_method") if isinstance(described, dict) else described
    if method is None or not isinstance(described, dict) or not AutoHfQuantizer.supports_quant_method(described):
        raise ValueError(f"{folder / 'config.json'}: unknown quant_method {method!r} in quantization_config")
    if method == COMPRESSED and find_spec("compressed_tensors") is None:
        raise RuntimeError(f"{folder} holds {COMPRESSED} weights: pip install 'saap[{COMPRESSED}]'")
    return described


def in_words(described: dict[str, Any]) -> str:
    """How the weights of a quantization_config are stored: "int4 in groups of 32", say."""
    method = described["quant_method"]
    packed = described.get("format") == "pack-quantized" and len(described.get("config_groups") or ()) == 1
    if method == METHOD or (method == COMPRESSED and packed):
        return str(Quantisation.of(described, Path("config.json")))
    return str(method)


def loading_options(folder: Path) -> dict[str, Any]:
    """Of ``from_pretrained`` for a model directory; errors as ``described_in``."""
    described = described_in(folder)
    compressed = described is not None and described["quant_method"] == COMPRESSED
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)} if compressed else {}


def make_plain(model: PreTrainedModel) -> None:
    """Remove what compressed-tensors leaves in a model whose weights it has unpacked: forwards, scales and shapes."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme"):
            for name in (
                "forward",
                "quantization_scheme",
                "quantization_status",
                "_original_forward_func",
                "is_staged",
            ):
                vars(module).pop(name, None)
            for name in [*module._parameters, *module._buffers]:
                if name not in ("weight", "bias"):
                    delattr(module, name)
        for held in ("_parameters", "_buffers"):  # the library's caches of what it moves between devices
            if type(vars(module)[held]) is not dict:
                vars(module)[held] = dict(vars(module)[held].items())
