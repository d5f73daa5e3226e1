"""Which sizes of a layer tensor parallelism can split over a number of devices: those that vLLM takes."""

import math
from collections.abc import Iterable

from saap.units import MODULES, LayerUnits


def size_of(sizes: LayerUnits, module: str) -> int:
    """KV heads of one layer, or the width of its MLP or of each expert."""
    return sizes.kv_heads if module == "attention" else sizes.intermediate_size


def splits(sizes: LayerUnits, module: str, kept: int, devices: int) -> bool:
    """Whether ``devices`` can share one layer's ``module`` when it keeps ``kept`` KV heads, or channels of an expert.

    Every device takes equally many query heads or channels. KV heads are shared out as well or, where they are
    fewer than the devices and divide their number, copied to each device whose query heads read them.
    """
    if module == "mlp":
        return kept % devices == 0
    return kept * sizes.group % devices == 0 and (kept % devices == 0 or devices % kept == 0)


def check_devices(devices: int) -> None:
    """Raise ValueError unless ``devices`` is a positive number of devices."""
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"tensor_parallel must be a positive number of devices; got {devices!r}")


def device_counts(layers: Iterable[LayerUnits]) -> tuple[int, ...]:
    """Numbers of devices that can share every one of ``layers`` as it is, ascending; (1,) where no unit is left."""
    layers = tuple(layers)
    most = math.gcd(*(size for layer in layers for size in (layer.query_heads, layer.intermediate_size)))
    return tuple(
        devices
        for devices in range(1, max(1, most) + 1)
        if all(splits(layer, module, size_of(layer, module), devices) for layer in layers for module in MODULES)
    )


def check_split(sizes: LayerUnits, layer: int, module: str, kept: int, devices: int, why: str = "") -> None:
    """Raise ValueError, naming the layer and its sizes, unless ``devices`` can share ``kept`` units of a module."""
    if not splits(sizes, module, kept, devices):
        has, wanted = described(sizes, module, kept), shareable(module, devices)
        raise ValueError(f"layer {layer}: tensor_parallel={devices} cannot split {has}{why}; expected {wanted}")


def described(sizes: LayerUnits, module: str, kept: int) -> str:
    """So many units of one layer's ``module`` in words."""
    if module == "mlp":
        return f"{kept} channels" + (" per expert" if sizes.experts else "")
    return f"{kept} KV heads with {sizes.group} query heads each"


def shareable(module: str, devices: int) -> str:
    """What ``splits`` expects, in words."""
    if module == "mlp":
        return f"a multiple of {devices}"
    return f"a multiple of {devices} KV heads, or a divisor of it with query heads that are a multiple of it"
