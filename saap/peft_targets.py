"""PEFT on pruned models: the modules that it adapts by default, which it knows by a stock family's model_type."""

import sys

from transformers import PreTrainedModel

from saap.families import PRUNED_PREFIX, family_of, known_families

TABLES = "TRANSFORMERS_MODELS_TO_"  # how peft's tables {model_type: modules} of its methods begin


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Names of the query and value projections, where LoRA's paper (Hu et al. 2021, section 4.2) puts its adapters.

    For ``peft.LoraConfig(target_modules=...)`` of families that peft has no default for; fused ones are one name.
    Raises ValueError for models of unknown families.
    """
    family = family_of(model)
    return list(dict.fromkeys(family.path(part).rpartition(".")[2] for part in ("q", "v")))


def register_peft_targets() -> None:
    """Give pruned models peft's defaults of their families, if peft is imported; may be called again."""
    constants = sys.modules.get("peft.utils.constants")
    tables = {} if constants is None else vars(constants)
    for name, table in tables.items():
        if not name.startswith(TABLES) or not isinstance(table, dict):
            continue
        for family in known_families():
            if family in table:
                table.setdefault(f"{PRUNED_PREFIX}{family}", table[family])
