"""The model card that goes with a pruned checkpoint."""

from transformers import PreTrainedModel

from saap.plan import Plan
from saap.quantised_config import in_words
from saap.stored_weight import METHOD
from saap.units import Units

_CARD = """---
library_name: transformers
tags: [pruned, saap]
---
# {title}

A structurally pruned causal language model: whole KV groups, MLP channels or experts were removed with SAAP {version}.

| | |
|---|---|
| parameters | {parameters:,} |
{removed}| KV heads per layer | {heads} |
{experts}| {mlp} per layer | {widths} |

## Load it

```python
{loading}
```
"""
_STOCK = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")  # a stock {kind}: nothing else is needed"""
_TEMPLATE = """from transformers import AutoModelForCausalLM
import saap  # or, without saap installed, trust_remote_code=True below
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")"""

_QUANTISED = """from transformers import AutoModelForCausalLM
import saap  # needed: pip install saap; without it transformers ignores the quantised weights and draws random ones
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")"""


def model_card(model: PreTrainedModel, units: Units, plan: Plan | None, version: str) -> str:
    """Markdown with sizes, how the model was made, and the lines that load it."""
    removed = ""
    if plan is not None:
        settings = ", ".join(
            f"{key} {value}"
            for key, value in plan.settings.items()
            if value is not None and value is not False and value != []
        )
        removed = (
            f"| removed | {plan.ratio:.2%} of all parameters, {plan.block_ratio:.2%} of the blocks' |\n"
            f"| made with | {settings} |\n"
        )
    kept = ", ".join(str(layer.experts) for layer in units.layers)
    mixture = any(layer.experts for layer in units.layers)
    template = type(model).__name__.startswith("Saap")
    loading = _TEMPLATE if template else _STOCK.format(kind=type(model).__name__)
    described = getattr(model.config, "quantization_config", None)
    if described is not None:
        values, dtype = dict(described), str(model.dtype).removeprefix("torch.")
        ours = values["quant_method"] == METHOD
        loading = _QUANTISED if ours else loading.replace("nothing else is needed", "pip install compressed-tensors")
        removed += f"| weights of the decoder layers | {in_words(values)}; the others {dtype} |\n"
    return _CARD.format(
        title=f"Pruned {units.family}",
        version=version,
        parameters=units.total_parameters,
        removed=removed,
        heads=", ".join(str(layer.kv_heads) for layer in units.layers),
        widths=", ".join(str(layer.intermediate_size) for layer in units.layers),
        experts=f"| experts per layer | {kept} |\n" if mixture else "",
        mlp="width of each expert" if mixture else "MLP width",
        loading=loading,
    )
