"""vLLM's Linears of quant_method "saap": in groups of 8 or 4 bits, on the kernels of ``saap_kernels``."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.parameter import ModelWeightParameter

from saap.serving.stored_shard import Placement, group_of_share, shard_rows
from saap.serving.vllm_rules import StoredFormat
from saap.stored_weight import NAMES, from_stored, stored_shapes
from saap_kernels import PackedWeight, linear


class SaapLinearMethod(LinearMethodBase):
    """Loads stored tensors, lays them out for the kernels and runs those."""

    def __init__(self, stored: StoredFormat) -> None:
        self.stored = stored

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters of this device's share, (sum of ``output_partition_sizes``, ``input_size_per_partition``)."""
        name, bits, group = getattr(layer, "prefix", "Linear"), self.stored.bits, self.stored.group_size
        own_group = group_of_share(name, input_size, input_size_per_partition, group)
        placement = Placement(name, shard_rows(layer), input_size, bits, group, own_group)
        shape = (sum(output_partition_sizes), input_size_per_partition)
        quantised = torch.int8 if bits == 8 else torch.uint8
        for kind, size in stored_shapes(shape, bits, own_group).items():
            parameter = ModelWeightParameter(
                data=torch.zeros(size, dtype=quantised if kind == "qweight" else params_dtype),
                input_dim=1,
                output_dim=0,
                weight_loader=placement.loader(kind, extra_weight_attrs["weight_loader"]),
            )
            layer.register_parameter(kind, parameter)
        layer.saap_placement = placement
        layer.saap_shape = shape
        layer.saap_dummy = _dummy_weights()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the weight out for the kernels; the stored tensors go."""
        placement = layer.saap_placement
        if placement is None:
            return
        if not layer.saap_dummy:
            placement.check_complete()
        stored = {kind: getattr(layer, kind).data for kind in NAMES}
        packed = from_stored(stored, layer.saap_shape[1], self.stored.bits, placement.group_size)
        assert packed.scale is not None and packed.zero is not None
        for kind, tensor in zip(NAMES, (packed.data, packed.scale, packed.zero), strict=True):
            delattr(layer, kind)
            layer.register_parameter(kind, nn.Parameter(tensor, requires_grad=False))
        layer.saap_group = placement.group_size
        layer.saap_placement = None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed = PackedWeight(
            layer.qweight, layer.saap_shape, self.stored.bits, layer.saap_group, layer.qscale, layer.qzero
        )
        return linear(x, packed, bias)


def _dummy_weights() -> bool:
    """Whether vLLM was asked for random weights instead of the checkpoint's."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"
