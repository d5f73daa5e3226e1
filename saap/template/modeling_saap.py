"""Models whose decoder layers differ in size, for any base family.

``SaapLlamaForCausalLM`` and ``SaapLlamaModel`` build the stock Llama and give every layer's projections the
sizes that ``config.per_layer_config`` states. ``config.saap_layout`` holds the paths of the layers and
projections, and which of these have a bias. Classes are made on request from the name, so one file serves every family.
"""

import transformers
from torch import nn

from .configuration_saap import config_class

HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_query_heads")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")


def set_head_counts(attention, query_heads, kv_heads):
    """Tell an attention module its own head counts, where it keeps them."""
    for names, count in ((HEAD_COUNTS, query_heads), (KV_HEAD_COUNTS, kv_heads)):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, count)


class _Resized:
    """Builds the base class with its global sizes, then resizes each layer."""

    def __init__(self, config, *args, **kwargs):
        sizes = config.__dict__.pop("_heterogeneity_spec", None)  # the stock constructors read one global size
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            if sizes is not None:
                config._heterogeneity_spec = sizes
        layout = config.saap_layout
        prefix = f"{self.base_model_prefix}."
        path = layout["layers"] if hasattr(self, self.base_model_prefix) else layout["layers"].removeprefix(prefix)
        for index, layer in enumerate(self.get_submodule(path)):
            self._resize(layer, config.per_layer_config[index], layout)

    def _resize(self, layer, config, layout):
        query_heads = getattr(config, layout["query_heads"])
        kv_heads = getattr(config, layout["kv_heads"] or layout["query_heads"])
        width = getattr(config, layout["intermediate_size"])
        head_dim = config.head_dim
        extents = {"q": query_heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "up": width}
        extents |= {"gate": width, "o": extents["q"], "down": width}
        for part, path in layout["projections"].items():
            old = layer.get_submodule(path)
            inside = part in ("o", "down")
            bias = old.bias is not None or part in layout.get("biases", ())
            if (old.in_features if inside else old.out_features) == extents[part] and bias is (old.bias is not None):
                continue
            shape = (extents[part], old.out_features) if inside else (old.in_features, extents[part])
            new = nn.Linear(*shape, bias=bias, device=old.weight.device, dtype=old.weight.dtype)
            new.requires_grad_(old.weight.requires_grad)
            if not new.weight.is_meta:
                self._init_weights(new)
            layer.set_submodule(path, new)
        set_head_counts(layer.get_submodule(layout["attention"]), query_heads, kv_heads)


def model_class(name):
    """The pruned counterpart of a stock model class: "SaapLlamaForCausalLM" from LlamaForCausalLM."""
    if name not in globals():
        base = getattr(transformers, name.removeprefix("Saap"), None)
        if not name.startswith("Saap") or base is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        members = {
            "__module__": __name__,
            "__doc__": f"{base.__name__} whose layers have their own sizes.",
            "config_class": config_class(f"Saap{base.config_class.__name__}"),
            "_auto_class": "AutoModelForCausalLM" if name.endswith("ForCausalLM") else "AutoModel",
        }
        globals()[name] = type(name, (_Resized, base), members)
    return globals()[name]


def __getattr__(name):
    return model_class(name)
