"""vLLM's configuration of quant_method "saap"; importing this module needs vLLM and registers it."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from saap.serving.vllm_rules import StoredFormat, check_files
from saap.stored_weight import METHOD


@register_quantization_config(METHOD)
class SaapQuantizationConfig(QuantizationConfig):
    """``quantization_config`` of a checkpoint, as vLLM asks for it."""

    def __init__(self, stored: StoredFormat) -> None:
        super().__init__()
        self.stored = stored

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the oldest that the CUDA kernels are built for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all of it stands in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SaapQuantizationConfig":
        return cls(StoredFormat.read(config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from saap.serving.vllm_linear import SaapLinearMethod  # imported when a model is built, not in every process

        if not isinstance(layer, LinearBase):
            return None  # embeddings, the head, attention and experts are stored as they were
        if self.stored.quantises(prefix, self.packed_modules_mapping):
            return SaapLinearMethod(self.stored)
        return UnquantizedLinearMethod()

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        check_files(model_name)  # before any process is started; nothing is updated
