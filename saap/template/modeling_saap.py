"""Models whose decoder layers differ in size, for any base family.

``SaapLlamaForCausalLM`` and ``SaapLlamaModel`` build the stock Llama and give every layer's projections the sizes that
``config.per_layer_config`` states. ``config.saap_layout`` holds the paths of layers and projections, and which of these
have a bias; parts with one path are rows of one Linear. Classes are made on request. Experts are built anew.
"""

import warnings

import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from .configuration_saap import config_class

HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_query_heads")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")


def set_head_counts(attention, query_heads, kv_heads):
    """Tell an attention module its own head counts, where it keeps them."""
    for names, count in ((HEAD_COUNTS, query_heads), (KV_HEAD_COUNTS, kv_heads)):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, count)


class NoAttention:
    """The forward of an attention without heads: what its output projection adds by itself, its bias or nothing."""

    def __init__(self, attention, o_name):
        self.attention, self.o_name = attention, o_name

    def __call__(self, hidden_states, *args, **kwargs):
        return self.attention.get_submodule(self.o_name)(hidden_states[..., :0]), None


def sizes_of(config, name):
    """A size as the configuration stores it, which for the model as a whole must not be read by its attribute."""
    return vars(config)[config.attribute_map.get(name, name)]


class SizedConfig:
    """A configuration as the modules of one layer read it, or (index None) those outside the layers: with one size.

    Everything else is read from the model's own one. A copy would keep the attention implementation that it was
    made with, and masks made for another one go wrong silently.
    """

    def __init__(self, config, index=None):
        layout = config.saap_layout
        names = [layout.get(name) for name in ("query_heads", "kv_heads", "intermediate_size", "experts")]
        names += [each for pair in config.attribute_map.items() if set(pair) & set(names) for each in pair]
        sizes = config if index is None else config.per_layer_config[index]
        vars(self).update({name: sizes_of(sizes, name) for name in filter(None, names)}, model_config=config)

    def __getattr__(self, name):
        if name.startswith("__"):  # copy and pickle ask before there is a model_config
            raise AttributeError(name)
        return getattr(self.model_config, name)


def share_config(model, layers, config):
    """Give every module below the models the configuration with the sizes that it may read."""
    owners = [(model, SizedConfig(config))] + [(layer, SizedConfig(config, i)) for i, layer in enumerate(layers)]
    for owner, sized in owners:
        for module in owner.modules():
            own = vars(module).get("config")
            if getattr(own, "model_config", own) is config and not isinstance(module, transformers.PreTrainedModel):
                module.config = sized


class _Resized:
    """Builds the base class with its global sizes, then resizes each layer."""

    def __init__(self, config, *args, **kwargs):
        method = dict(getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method == "saap" and method not in AUTO_QUANTIZER_MAPPING:  # transformers would draw random weights
            raise ValueError("it holds weights quantised by saap: install saap and import it before loading")
        sizes = config.__dict__.pop("_heterogeneity_spec", None)  # the stock constructors read one global size
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            if sizes is not None:
                config._heterogeneity_spec = sizes
        layout = config.saap_layout
        prefix = f"{self.base_model_prefix}."
        path = layout["layers"] if hasattr(self, self.base_model_prefix) else layout["layers"].removeprefix(prefix)
        layers = self.get_submodule(path)
        share_config(self, layers, config)
        for index, layer in enumerate(layers):
            self._resize(layer, SizedConfig(config, index), layout)

    @classmethod
    def _can_set_experts_implementation(cls):
        base = getattr(transformers, cls.__name__.removeprefix("Saap"))
        return base._can_set_experts_implementation()  # reads the file of the class for experts; here are none

    def init_continuous_batching(self, *args, **kwargs):
        """As the base class, whose paged cache has one number of KV heads; ValueError names a layer of another one."""
        name = self.config.saap_layout["kv_heads"] or self.config.saap_layout["query_heads"]
        for index, sizes in enumerate(self.config.per_layer_config):
            if (count := sizes_of(sizes, name)) != (wanted := sizes_of(self.config, name)):
                raise ValueError(f"continuous batching needs {wanted} KV heads per layer; layer {index} has {count}")
        return super().init_continuous_batching(*args, **kwargs)

    def _rebuild(self, layer, path, config):
        old = layer.get_submodule(path)
        like = next(old.parameters())
        with like.device:
            new = type(old)(config).to(like.dtype)
        for module in new.modules():
            if not like.is_meta:
                self._init_weights(module)
        layer.set_submodule(path, new.requires_grad_(like.requires_grad))

    def _resize(self, layer, config, layout):
        query_heads = getattr(config, layout["query_heads"])
        kv_heads = getattr(config, layout["kv_heads"] or layout["query_heads"])
        width = getattr(config, layout["intermediate_size"])
        head_dim = config.head_dim
        extents = {"q": query_heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "up": width}
        extents |= {"gate": width, "o": extents["q"], "down": width}
        paths = layout["projections"]
        if "sparse_block" in layout:
            self._rebuild(layer, layout["sparse_block"], config)
        for path in dict.fromkeys(paths.values()):
            old = layer.get_submodule(path)
            inside = path in (paths["o"], paths.get("down"))
            here = [part for part in paths if paths[part] == path]
            bias = old.bias is not None or any(part in layout.get("biases", ()) for part in here)
            extent = sum(extents[part] for part in here)
            if (old.in_features if inside else old.out_features) == extent and bias is (old.bias is not None):
                continue
            shape = (extent, old.out_features) if inside else (old.in_features, extent)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of a module that is gone
                new = nn.Linear(*shape, bias=bias, device=old.weight.device, dtype=old.weight.dtype)
            new.requires_grad_(old.weight.requires_grad)
            if not new.weight.is_meta:
                self._init_weights(new)
            layer.set_submodule(path, new)
        attention = layer.get_submodule(layout["attention"])
        set_head_counts(attention, query_heads, kv_heads)
        if query_heads == 0:
            attention.forward = NoAttention(attention, paths["o"].removeprefix(layout["attention"] + "."))


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
