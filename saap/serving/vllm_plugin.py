"""The entry point of vLLM's general plugins: pruned models and quantised checkpoints without flags.

vLLM calls ``register`` in each of its processes, whatever model it serves: it is cheap, may be called again, and does
not keep vLLM from serving models that are not ours.
"""

import logging
import sys
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from saap.families import family_named, known_families
from saap.layout import register_template_classes
from saap.serving.vllm_rules import check_files, check_served

BACKEND = "vllm.model_executor.models.transformers:Transformers"  # what vLLM builds from transformers' own modules
NEEDED = "0.28"  # the first that gives every layer its own sizes
logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know the classes of pruned checkpoints and quant_method "saap"; may be called again.

    A vLLM that is too old for them says so in its log and serves other models as before.
    """
    register_template_classes()
    for what, add in (
        ("pruned checkpoints whose layers differ in size", register_models),
        ("quantised checkpoints", register_quantisation),
    ):
        try:
            add()
        except (ImportError, AttributeError) as error:
            logger.warning("saap: %s need vLLM >= %s, this is %s (%s)", what, NEEDED, _version(), error)


def backends() -> dict[str, str]:
    """{class of a template: vLLM's class for it, to be imported when a model asks for it}."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {
        f"Saap{known[name]}": f"{BACKEND}{'MoE' if family_named(name).experts else ''}ForCausalLM"
        for name in known_families()
        if name in known
    }


def register_models() -> None:
    """Let vLLM build pruned models by transformers' own classes, and check their sizes before it starts anything."""
    from vllm import ModelRegistry
    from vllm.config.model_arch import ModelArchitectureConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    if not hasattr(ModelArchitectureConfig, "per_layer_overrides"):
        raise AttributeError("its models have one size for all layers")

    class CheckedConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            model = vllm_config.model_config
            check_files(model.model)
            check_served(model.hf_config, vllm_config.parallel_config.tensor_parallel_size)

    for name, backend in backends().items():
        ModelRegistry.register_model(name, backend)
        MODELS_CONFIG_MAP[name] = CheckedConfig


def register_quantisation() -> None:
    """Let vLLM load checkpoints of quant_method "saap"; the module registers itself."""
    import saap.serving.vllm_quantisation  # noqa: F401


def _version() -> str:
    return str(getattr(sys.modules.get("vllm"), "__version__", "not vLLM"))
