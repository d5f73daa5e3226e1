"""The header of a GGUF file: sizes, rotary embedding and context of a model, as llama.cpp's architectures read them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from saap.families import PRUNED_PREFIX
from saap.serving.gguf_architecture import Architecture, architecture_of, refuse_other_mathematics
from saap.units import LayerUnits
from saap.version import __version__

ROPE_FACTORS = "rope_freqs.weight"
FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q5_0": "MOSTLY_Q5_0",
    "q5_1": "MOSTLY_Q5_1", "q4_0": "MOSTLY_Q4_0", "q4_1": "MOSTLY_Q4_1",
}  # fmt: skip
ROPES = {  # and the parameters that each needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
FACTORS_IN = ("llama", "deci")  # the architectures that read rope_freqs


def form_of(config: PreTrainedConfig, layers: Sequence[LayerUnits]) -> tuple[Architecture, NDArray[np.float32] | None]:
    """The architecture of a model's file and its rotary factors, see ``rope_factors``.

    Raises ValueError, naming layer and size, for models that llama.cpp has no architecture for.
    """
    family = str(config.model_type).removeprefix(PRUNED_PREFIX)
    architecture = architecture_of(family, layers, bool(config.tie_word_embeddings))
    refuse_other_mathematics(config)
    return architecture, rope_factors(rope_of(config), architecture, layers[0].head_dim)


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary embedding's parameters, "rope_type" and "rope_theta" among them.

    Raises ValueError for kinds that the exporter does not write: nothing of them is dropped.
    """
    values = dict(getattr(config, "rope_parameters", None) or {})
    values = {"rope_type": "default", "rope_theta": 1e4} | values
    if values["rope_type"] not in ROPES:
        raise ValueError(
            f"expected rotary embeddings of one of the kinds {', '.join(ROPES)}; got rope_type {values['rope_type']!r}"
        )
    lacking = [name for name in ROPES[values["rope_type"]] if name not in values]
    if lacking:
        raise ValueError(f"rotary embeddings of rope_type {values['rope_type']!r} need {', '.join(lacking)}")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"llama.cpp turns whole heads of these models; got partial_rotary_factor {values['partial_rotary_factor']}"
        )
    return values


def rope_factors(rope: Mapping[str, Any], architecture: Architecture, head_dim: int) -> NDArray[np.float32] | None:
    """By how much Llama 3 slows every rotation down, (head_dim / 2,) fp32; None for other kinds of rotary embedding.

    Raises ValueError where the architecture does not read such factors.
    """
    if rope["rope_type"] != "llama3":
        return None
    if architecture.name not in FACTORS_IN:
        raise ValueError(f"llama.cpp's {architecture.name} has no rotary embedding of rope_type 'llama3'")
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    plain_rates, rates = (_rates(values, head_dim) for values in (plain, dict(rope)))
    return (plain_rates / rates).numpy()


def _rates(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    if rope["rope_type"] == "default":
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=rope)
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))[0].float()


def context_of(config: PreTrainedConfig, tell: Callable[[str], None]) -> int:
    """Positions the file says it has: those within a sliding window, which these architectures do not have.

    Within the window full and sliding attention are the same function.
    """
    positions = int(config.max_position_embeddings)
    kinds = getattr(config, "layer_types", None)
    sliding = any(kind == "sliding_attention" for kind in kinds) if kinds else True
    window = getattr(config, "sliding_window", None) if sliding else None
    if window and window < positions:
        tell(
            f"context of {window} instead of {positions} tokens: llama.cpp has no sliding window for this family, and "
            "within the window both are the same"
        )
        return int(window)
    return positions


def write_metadata(
    writer: Any,
    config: PreTrainedConfig,
    architecture: Architecture,
    layers: Sequence[LayerUnits],
    *,
    kind: str,
    name: str,
    context: int,
) -> None:
    """Add everything but tokenizer and tensors to a ``gguf.GGUFWriter``."""
    import gguf

    def of_layers(values: list[int]) -> int | list[int]:
        return values if architecture.per_layer else values[0]

    first, rope = layers[0], rope_of(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(f"written by saap {__version__}")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(layers))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(first.hidden_size)
    writer.add_head_count(of_layers([layer.query_heads for layer in layers]))
    writer.add_head_count_kv(of_layers([layer.kv_heads for layer in layers]))
    writer.add_feed_forward_length(of_layers([layer.intermediate_size for layer in layers]))
    writer.add_key_length(first.head_dim)
    writer.add_value_length(first.head_dim)
    writer.add_rope_dimension_count(first.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
