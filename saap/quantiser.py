"""transformers' plugin for quant_method "saap": loads quantised checkpoints, and quantises while loading others."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from saap.families import family_of
from saap.gptq import quantise_weight
from saap.quantised_linear import QuantisedLinear
from saap.stored_form import VERSION, StoredForm, is_known, names_in
from saap.stored_weight import GROUPS, METHOD, NAMES, stored_shapes
from saap_kernels import pack

ROUNDINGS = ("nearest", "clip", "gptq")  # see saap.quantise
DTYPES = {4: "U8", 8: "I8"}  # of qweight, as safetensors calls them


@register_quantization_config(METHOD)
class SaapConfig(QuantizationConfigMixin):
    """How a checkpoint's Linears are quantised: ``bits`` 8 or 4, ``group_size`` 32, 64 or 128 along a row.

    ``modules_to_not_convert`` names Linears of the decoder layers that stay as they are, by any end of their names;
    what is outside of the layers, and the experts' tensors of mixtures, always do. Raises ValueError for
    anything else.
    """

    def __init__(
        self, bits: int = 4, group_size: int = 32, modules_to_not_convert: Iterable[str] | None = ("lm_head",),
        version: int = VERSION, **others: Any,
    ) -> None:  # fmt: skip
        if type(version) is not int or version < 1:
            raise ValueError(f"quantization_config: expected version 1 to {VERSION}, got {version!r}")
        if version > VERSION:
            raise ValueError(
                f"quantization_config: version {version} was written by a newer saap; this one reads up to {VERSION}"
            )
        method = others.pop("quant_method", METHOD)
        if others or method != METHOD:
            found = ", ".join(sorted(others)) or f"quant_method {method!r}"
            raise ValueError(f"quantization_config: unknown settings for quant_method {METHOD!r}: {found}")
        check_bits(bits, group_size)
        names = names_in(modules_to_not_convert)
        if names is None:
            raise ValueError(f"modules_to_not_convert: expected a list of names, got {modules_to_not_convert!r}")
        self.quant_method, self.version, self.bits, self.group_size = METHOD, version, bits, group_size
        self.modules_to_not_convert = list(names)

    @property
    def form(self) -> StoredForm:
        """The same, as every reader of a checkpoint has it."""
        return StoredForm(self.bits, self.group_size, tuple(self.modules_to_not_convert))

    def __str__(self) -> str:
        return str(self.form)

    def leaves(self, name: str) -> bool:
        """Whether the Linear of this name stays as it is."""
        return self.form.keeps(name)


def check_bits(bits: int, group_size: int) -> None:
    """Raise ValueError unless a checkpoint can be quantised so."""
    if not is_known("bits", bits):
        raise ValueError(f"bits: expected 8 or 4, got {bits!r}")
    if not is_known("group_size", group_size):
        raise ValueError(f"group_size: expected one of {', '.join(map(str, GROUPS))}, got {group_size!r}")


def linears_to_quantise(model: PreTrainedModel, config: SaapConfig) -> dict[str, nn.Linear]:
    """{name: Linear} of the decoder layers, without those that ``config`` leaves and those of which nothing is left.

    ``model`` with or without its head. Raises ValueError for unknown families and for Linears that are more than that.
    """
    family, prefix = family_of(model), f"{model.base_model_prefix}."
    whole = hasattr(model, model.base_model_prefix)
    path = family.layers if whole else family.layers.removeprefix(prefix)
    found = {}
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        if not isinstance(module, nn.Linear) or config.leaves(name if whole else f"{prefix}{name}"):
            continue
        if 0 in (module.in_features, module.out_features):
            continue
        if type(module) is not nn.Linear:
            raise ValueError(f"{name}: expected an nn.Linear to quantise, got {type(module).__name__}")
        found[name] = module
    return found


def make_blank(model: PreTrainedModel, config: SaapConfig) -> dict[str, QuantisedLinear]:
    """Quantised Linears without values in a model on the meta device: {name: module}."""
    linears = linears_to_quantise(model, config)
    for module in linears.values():
        QuantisedLinear.convert_blank(module, config.bits, config.group_size)
    return linears  # type: ignore[return-value]  # of this class from here on


@register_quantizer(METHOD)
class SaapQuantizer(HfQuantizer):
    """Makes a model's Linears quantised ones on the meta device, and lays out what was loaded into them.

    Of a checkpoint that is not quantised, each weight is quantised as it is read.
    """

    requires_calibration = False
    quantization_config: SaapConfig

    def __init__(self, quantization_config: SaapConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.linears: dict[str, nn.Linear] = {}
        self.failure: ValueError | None = None  # of the first weight that could not be quantised

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map: quantised weights cannot be offloaded to disk")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self.linears = dict(make_blank(model, self.quantization_config))
            check_stored(model.base_model_prefix, self.linears, self.quantization_config, checkpoint_files or [])
        else:
            self.linears = linears_to_quantise(model, self.quantization_config)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        name, _, kind = param_name.rpartition(".")
        return kind == "weight" and name in self.linears

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failure is not None:
            raise self.failure
        for name, linear in self.linears.items():
            if not isinstance(linear, QuantisedLinear):
                raise ValueError(f"the checkpoint has no {name}.weight")
            if self.pre_quantized:
                linear.pack_stored(name)
        self.linears = {}
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for module in list(model.modules()):
            if isinstance(module, QuantisedLinear):
                module.restore()
        if dtype is not None:
            for parameter in model.parameters():  # buffers stay: frequencies of rotary embeddings are kept in fp32
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters beside the quantised weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantise(ConversionOps):
    """Takes a weight that was read, and makes its Linear a quantised one."""

    def __init__(self, quantizer: SaapQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None,
        missing_keys: set[str] | None = None, **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        (values,) = input_dict.values()
        weight = values[0] if isinstance(values, list) else values
        module, config = model.get_submodule(full_layer_name.rpartition(".")[0]), self.quantizer.quantization_config
        try:
            quantise_linear(module, full_layer_name, config, weight)
        except ValueError as error:  # transformers would turn it into a table of all that went wrong
            self.quantizer.failure = self.quantizer.failure or error
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}  # nothing is left to set


def quantise_linear(
    module: nn.Linear, name: str, config: SaapConfig, weight: Tensor | None = None, clip: bool = False,
    symmetric: bool = False,
) -> None:  # fmt: skip
    """Make ``module`` a quantised one, of its own weight unless given; ``name`` is the weight's, for errors.

    ``clip`` searches the ranges of its groups, which may be ``symmetric``: see ``saap.gptq.quantise_weight``.
    """
    try:
        given = (module.weight if weight is None else weight).detach()
        make = partial(quantise_weight, clip=clip, symmetric=symmetric) if clip or symmetric else pack
        packed = make(given, bits=config.bits, group_size=config.group_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    QuantisedLinear.convert(module, packed)


def check_stored(prefix: str, linears: dict[str, nn.Linear], config: SaapConfig, files: list[str]) -> None:
    """Raise ValueError naming the first tensor that safetensors ``files`` lack, or have in another shape or dtype.

    Reads headers only; names may begin with ``prefix`` or not, in the files as in ``linears``.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"expected quantised weights in safetensors files, got {Path(file).name}")
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  # not a mapping
                piece = handle.get_slice(key)
                found[key.removeprefix(f"{prefix}.")] = tuple(piece.get_shape()), piece.get_dtype()
    if not files:
        return  # a state dict was given; what is missing shows when it is loaded
    for name, linear in linears.items():
        wanted = stored_shapes((linear.out_features, linear.in_features), config.bits, config.group_size)
        for kind in NAMES:
            key = f"{name}.{kind}"
            shape, dtype = found.get(key.removeprefix(f"{prefix}."), (None, None))
            if shape is None:
                raise ValueError(f"the checkpoint has no {key}, which its quantization_config asks for")
            if shape != wanted[kind] or (kind == "qweight" and dtype != DTYPES[config.bits]):
                raise ValueError(
                    f"{key}: expected shape {wanted[kind]} for {config.bits} bits in groups of {config.group_size}, "
                    f"got {shape} of {dtype}; quantization_config does not describe this checkpoint"
                )
