"""Configuration of models whose decoder layers differ in size, for any base family.

``SaapLlamaConfig`` is ``LlamaConfig`` with ``model_type`` "saap_llama"; the sizes of each layer stand in
``per_layer_config`` and ``saap_layout`` says where the projections are. Classes are made on request
from the name, so one file serves every family. Needs transformers >= 5.15 and nothing else.
"""

import transformers
from huggingface_hub.dataclasses import strict


def config_class(name):
    """The pruned counterpart of a stock configuration class: "SaapLlamaConfig" from LlamaConfig."""
    if name not in globals():
        base = getattr(transformers, name.removeprefix("Saap"), None)
        if not name.startswith("Saap") or base is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        members = {
            "__module__": __name__,
            "__doc__": f"{base.__name__} whose layers have their own sizes.",
            "model_type": f"saap_{base.model_type}",
            # the stock checks assume one size for all layers; the true sizes are checked on loading the weights
            "validate_architecture": lambda self: None,
            "validate_rope": lambda self: None,  # Phi-3's counts heads
            "_auto_class": "AutoConfig",
        }
        globals()[name] = strict(type(name, (base,), members))
    return globals()[name]


def __getattr__(name):
    return config_class(name)
