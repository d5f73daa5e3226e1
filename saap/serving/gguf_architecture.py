"""Which of llama.cpp's architectures runs a model, and the sizes that none of them does: told before any work.

llama.cpp's `llama`, `qwen2` and `qwen3` size all layers like the first. `deci` and `openelm` read the number of heads,
KV heads and MLP channels of every layer, and compute what Llama, Mistral and Qwen2, and what Qwen3 with tied embeddings
compute; read in src/models/{llama,qwen2,qwen3,deci,openelm}.cpp of llama.cpp 0c1e57098 and checked on logits
(tests/serving/llamacpp_cases.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from saap.units import LayerUnits

SUPPORTED = "Llama, Mistral, Qwen2, and Qwen3 (with layers that differ in size only where its embeddings are tied)"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
BLOCK = 32  # weights of one row that share a scale in q8_0, q5_0, q5_1, q4_0 and q4_1


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    ``neighbours``: rotary embedding turns rows 2j and 2j+1 of a head, where transformers turns j and j + head_dim/2.
    ``fused``: q, k and v are one tensor. ``biases``: parts that may have one.
    """

    name: str
    neighbours: bool
    fused: bool = False
    per_layer: bool = False
    biases: tuple[str, ...] = ()


_EVERY = ("q", "k", "v", "o", "gate", "up", "down")
LLAMA = Architecture("llama", neighbours=True, biases=_EVERY)
DECI = Architecture("deci", neighbours=True, per_layer=True, biases=_EVERY)
QWEN2 = Architecture("qwen2", neighbours=False, biases=("q", "k", "v"))
QWEN3 = Architecture("qwen3", neighbours=False)
OPENELM = Architecture("openelm", neighbours=False, fused=True, per_layer=True)


def refuse_family(name: str) -> None:
    """Raise ValueError unless GGUF files can be made of the family ``name``."""
    if name not in FAMILIES:
        raise ValueError(f"GGUF files can be made of {SUPPORTED}; got a model of family {name!r}")


def architecture_of(family: str, layers: Sequence[LayerUnits], tied: bool) -> Architecture:
    """The architecture that runs layers of these sizes; ValueError, naming the layer, where there is none."""
    refuse_family(family)
    _refuse_empty(layers)
    uniform = len({(layer.query_heads, layer.kv_heads, layer.intermediate_size) for layer in layers}) == 1
    found = _suited(family, layers, uniform)
    if found is OPENELM and not tied:
        raise ValueError(
            "llama.cpp has no architecture for a Qwen3 whose layers differ in size and whose embeddings are not tied; "
            "prune it with --uniform, or keep tie_word_embeddings"
        )
    for index, layer in enumerate(layers):
        lacking = [part for part in layer.biases if part not in found.biases]
        if lacking:
            raise ValueError(
                f"layer {index}: llama.cpp's {found.name} has no bias in {', '.join(lacking)}, this model has"
            )
    return found


def _suited(family: str, layers: Sequence[LayerUnits], uniform: bool) -> Architecture:
    first = layers[0]
    if family == "qwen3":
        return QWEN3 if uniform else OPENELM
    if family == "qwen2":
        square = first.query_heads * first.head_dim == first.hidden_size  # which llama.cpp's qwen2 takes for granted
        plain = all(set(layer.biases) <= set(QWEN2.biases) for layer in layers)
        return QWEN2 if uniform and square and plain else DECI
    return LLAMA if uniform else DECI


def _refuse_empty(layers: Sequence[LayerUnits]) -> None:
    if len(layers) > MOST_LAYERS:
        raise ValueError(f"llama.cpp takes at most {MOST_LAYERS} layers, this model has {len(layers)}")
    for index, layer in enumerate(layers):
        if not layer.query_heads:
            raise ValueError(
                f"layer {index} has no attention heads, which llama.cpp's architectures for this family do not take; "
                "prune without --allow-empty"
            )
        if not layer.intermediate_size:
            raise ValueError(
                f"layer {index} has no MLP channels: llama.cpp would leave out its attention too, without a word; "
                "prune without --allow-empty"
            )


def refuse_misaligned(layers: Sequence[LayerUnits], kind: str) -> None:
    """Raise ValueError, naming layer and size, unless all rows are whole blocks of a quantised type."""
    hidden = layers[0].hidden_size
    if hidden % BLOCK:
        raise ValueError(
            f"{kind} needs rows of a multiple of {BLOCK} weights; hidden_size is {hidden}: use --type f16 or bf16"
        )
    for index, layer in enumerate(layers):
        heads = layer.query_heads * layer.head_dim
        for part, size, what in (
            ("down_proj", layer.intermediate_size, "MLP channels"),
            ("o_proj", heads, f"inputs of its {layer.query_heads} heads of {layer.head_dim}"),
        ):
            if size % BLOCK:
                raise ValueError(
                    f"{kind} needs rows of a multiple of {BLOCK} weights; layer {index}: {part} has {size} ({what}). "
                    f"saap prune --for llama.cpp (or --multiple {BLOCK}, of MLP channels) keeps such sizes; "
                    "--type f16 takes any"
                )


def refuse_other_mathematics(config: PreTrainedConfig) -> None:
    """Raise ValueError for what the architectures compute otherwise than the configuration says."""
    act = getattr(config, "hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ValueError(f"llama.cpp computes these models with silu; this one has hidden_act {act!r}")
