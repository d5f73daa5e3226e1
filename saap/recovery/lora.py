"""Baseline: LoRA through peft, on plain weights or beside quantised ones, merged into plain weights."""

import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.quantised_linear import QuantisedLinear, is_quantised
from saap.recovery.attach import decoder_linears, require, requirements
from saap.recovery.settings import Settings


class Lora:
    """peft's adapters learn."""

    def __init__(self, base: PreTrainedModel, settings: Settings) -> None:
        peft = peft_module()
        targets = decoder_linears(base)
        config = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        self._base, self._before = base, requirements(base)
        devices = sorted({each.device for each in base.parameters() if each.is_cuda}, key=str)
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*target_modules.*")  # hundreds of names are meant
            torch.manual_seed(settings.seed)
            self.model: nn.Module = peft.get_peft_model(base, config)

    def finish(self) -> PreTrainedModel:
        """Quantised weights are written out first: int4 and int8 cannot hold a change of full rank in their inputs."""
        if is_quantised(self._base):
            _write_out(self._base)
        merged: Any = self.model.merge_and_unload()  # type: ignore[operator]  # peft has no types
        require(merged, self._before)
        return merged


def attach_lora(model: PreTrainedModel, settings: Settings) -> Lora:
    """``attach`` for method "lora"."""
    return Lora(model, settings)


def peft_module() -> Any:
    """peft, or RuntimeError naming what installs it."""
    try:
        import peft
    except ImportError as error:
        raise RuntimeError(f"LoRA needs peft: pip install 'saap[recover]' ({error})") from error
    return peft


def _write_out(model: PreTrainedModel) -> None:
    """Plain weights in the stead of quantised ones, and no quantisation in the configuration."""
    for module in list(model.modules()):
        if isinstance(module, QuantisedLinear):
            module.restore()
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # its own dequantize would round what peft keeps in fp32, before it is merged
        quantizer.remove_quantization_config(model)
