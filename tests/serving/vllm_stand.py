"""A stand-in for vLLM: the few names that the plugin touches, with the behaviour that it relies on."""

import sys
import types

import pytest
import torch
from torch import nn


class Parameter(nn.Parameter):
    """Of vLLM: a parameter that brings its loader, and says which of its dimensions a loader may cut."""

    def __new__(cls, data, **attributes):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, weight_loader, input_dim, output_dim):
        self.weight_loader, self.input_dim, self.output_dim = weight_loader, input_dim, output_dim


class LinearBase(nn.Module):
    """Of vLLM: one device's share of a Linear that may be several of a checkpoint's, "column" or "row" parallel."""

    def __init__(self, name, quantisation, columns, rows, kind="column", rank=0, devices=1):
        super().__init__()
        self.prefix, self.output_sizes, self.output_size = name, rows, sum(rows)
        self.rank, self.devices, self.kind = rank, devices, kind
        self.quant_method = quantisation.get_quant_method(self, name)
        split = (1, devices) if kind == "column" else (devices, 1)
        self.quant_method.create_weights(
            self, columns // split[0], [size // split[1] for size in rows], columns, sum(rows), torch.float32,
            weight_loader=self.load,
        )  # fmt: skip

    def load(self, parameter, loaded, shard=None):
        if self.kind == "row":
            width = parameter.shape[parameter.input_dim]
            parameter.data.copy_(loaded.narrow(parameter.input_dim, self.rank * width, width))
            return
        if shard is None:  # the checkpoint has them in one already
            for index, part in enumerate(loaded.split(self.output_sizes)):
                self.load(parameter, part, index)
            return
        share = self.output_sizes[shard] // self.devices
        start = sum(self.output_sizes[:shard]) // self.devices
        parameter.data[start : start + share].copy_(loaded.narrow(parameter.output_dim, self.rank * share, share))


class Stand:
    """What stands in for vLLM."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}
        self.checks: dict[str, type] = {}
        self.methods: dict[str, type] = {}
        self.load_format = "auto"

    def register_model(self, name: str, path: str) -> None:
        module, _, kind = path.partition(":")
        assert module.startswith("vllm.") and kind
        self.models[name] = path

    def register_quantisation(self, name: str):
        def keep(kind: type) -> type:
            self.methods[name] = kind
            return kind

        return keep


def module(name: str, **names) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(names)
    return made


@pytest.fixture
def vllm(monkeypatch) -> Stand:
    """The stand-in, importable as vLLM."""
    stand = Stand()

    class QuantizationConfig:
        def __init__(self) -> None:
            self.packed_modules_mapping: dict[str, list[str]] = {}

    def current():
        return types.SimpleNamespace(load_config=types.SimpleNamespace(load_format=stand.load_format))

    arch = type("ModelArchitectureConfig", (), {"per_layer_overrides": None})
    layers, methods = "vllm.model_executor.layers", type("LinearMethodBase", (), {})
    for made in (
        module("vllm", ModelRegistry=stand, __version__="0.32.0"),
        module("vllm.config", get_current_vllm_config_or_none=current),
        module("vllm.config.model_arch", ModelArchitectureConfig=arch),
        module("vllm.model_executor"),
        module("vllm.model_executor.models"),
        module(
            "vllm.model_executor.models.config",
            MODELS_CONFIG_MAP=stand.checks,
            VerifyAndUpdateConfig=type("VerifyAndUpdateConfig", (), {}),
        ),
        module(layers),
        module(
            f"{layers}.linear",
            LinearBase=LinearBase,
            LinearMethodBase=methods,
            UnquantizedLinearMethod=type("UnquantizedLinearMethod", (methods,), {}),
        ),
        module(f"{layers}.quantization", register_quantization_config=stand.register_quantisation),
        module(f"{layers}.quantization.base_config", QuantizationConfig=QuantizationConfig, QuantizeMethodBase=object),
        module("vllm.model_executor.parameter", ModelWeightParameter=Parameter),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    for name in ("saap.serving.vllm_quantisation", "saap.serving.vllm_linear"):  # made anew on this stand
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(f"{name}", raising=False)
    return stand
