"""What vLLM can run of ours, and what a quantised checkpoint says of itself; needs no vLLM."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from saap.checkpoint_files import check_safetensors
from saap.stored_form import StoredForm
from saap.tensor_parallel import check_split
from saap.units import LayerUnits

_IN_A_LAYER = re.compile(r"(^|\.)layers\.\d+\.")


class StoredFormat(StoredForm):
    """What ``quantization_config`` of a checkpoint says, asked by vLLM's names."""

    def quantises(self, name: str, fused: Mapping[str, Sequence[str]]) -> bool:
        """Whether the Linear ``name`` of a decoder layer is stored quantised.

        ``fused`` names, by its last component, the Linears of a checkpoint that vLLM runs as one. Raises ValueError
        where only some of those are quantised.
        """
        if not _IN_A_LAYER.search(name):
            return False
        owner, _, last = name.rpartition(".")
        parts = list(fused.get(last) or [last])
        kept = [part for part in parts if self.keeps(f"{owner}.{part}")]
        if kept and len(kept) < len(parts):
            raise ValueError(
                f"modules_to_not_convert leaves {', '.join(kept)} of {owner} as they were, but vLLM runs "
                f"{', '.join(parts)} as one: expected all of them or none"
            )
        return not kept


def check_files(path: str) -> None:
    """Raise ValueError naming a damaged weight file of a model directory; a name on the hub passes."""
    for file in sorted(Path(path).glob("*.safetensors")):
        check_safetensors(file)


def check_served(config: PreTrainedConfig, devices: int) -> None:
    """Raise ValueError, naming the layer, for a template's configuration that vLLM cannot run on ``devices`` devices.

    vLLM refuses layers without attention and, on the CPU, crashes at MLPs without channels; it gives all mixtures of
    a model one size; and every tensor-parallel device takes an equal share of each size.
    """
    layers = layer_sizes(config)
    for index, sizes in enumerate(layers):
        for what, size in (("attention", sizes.query_heads), ("MLP", sizes.intermediate_size)):
            if size == 0:
                raise ValueError(
                    f"layer {index} has no {what}, which vLLM cannot run; expected one in every layer: prune without "
                    "--allow-empty, or use `saap serve`"
                )
        mixture, first = ((each.experts, each.intermediate_size) for each in (sizes, layers[0]))
        if sizes.experts and mixture != first:
            raise ValueError(
                f"layer {index} has {mixture[0]} experts of width {mixture[1]}, layer 0 {first[0]} of {first[1]}; vLLM "
                "expects the same in every layer: prune with --uniform, or use `saap serve`"
            )
        for module, kept in (("attention", sizes.kv_heads), ("mlp", sizes.intermediate_size)):
            check_split(sizes, index, module, kept, devices)


def layer_sizes(config: PreTrainedConfig) -> list[LayerUnits]:
    """Sizes of every layer of a template's configuration, biases left out."""
    layout = config.saap_layout
    sizes = []
    for index in range(config.num_hidden_layers):
        layer = config.per_layer_config[index]
        query_heads = getattr(layer, layout["query_heads"])
        sizes.append(
            LayerUnits(
                hidden_size=config.hidden_size,
                query_heads=query_heads,
                kv_heads=getattr(layer, layout["kv_heads"]) if layout["kv_heads"] else query_heads,
                head_dim=config.head_dim,
                intermediate_size=getattr(layer, layout["intermediate_size"]),
                gated=True,
                experts=getattr(layer, layout["experts"]) if "experts" in layout else 0,
            )
        )
    return sizes
