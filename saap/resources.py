"""What a budget is counted in: parameters, multiply-accumulates, bytes, or measured latency."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from saap.latency import LatencyTable
from saap.units import MODULES, LayerUnits, Units


@dataclass(frozen=True)
class Resource:
    """Base: what a module costs by the number of units it keeps, and what the whole model costs."""

    unit: ClassVar[str] = "parameters"

    def module(self, sizes: LayerUnits, module: str, kept: Tensor) -> Tensor:
        """Cost of one module of one layer that keeps ``kept`` (n,) of its units; (n,) float64."""
        return kept * float(sizes.unit_parameters(module))

    def outside(self, units: Units) -> float:
        """Cost of everything that is not in a decoder layer's attention or MLP."""
        return float(units.total_parameters - sum(layer.parameters(m) for layer in units.layers for m in MODULES))

    def whole(self, units: Units, ratio_of: str) -> float:
        """What a ratio is a share of: the cost of the ``"model"``, or of its ``"blocks"`` alone."""
        blocks = sum(
            float(self.module(layer, module, torch.tensor([layer.count(module)], dtype=torch.float64)))
            for layer in units.layers
            for module in MODULES
        )
        return blocks + (self.outside(units) if ratio_of == "model" else 0.0)

    def check(self, units: Units) -> None:
        """Raise ValueError when this resource cannot be told for the model."""

    def warn_of_dtype(self, dtype: torch.dtype) -> None:
        """Warn when what is counted holds for another dtype than the model's."""

    def settings(self) -> dict[str, Any]:
        """Plain values for a plan's settings."""
        return {"resource": self.unit, **asdict(self)}


@dataclass(frozen=True)
class Parameters(Resource):
    """Stored parameters, tied tensors once."""

    def whole(self, units: Units, ratio_of: str) -> float:
        return float(units.total_parameters if ratio_of == "model" else units.block_parameters)

    def settings(self) -> dict[str, Any]:
        return {}  # what a ratio is of unless something else is said


@dataclass(frozen=True)
class Macs(Resource):
    """Multiply-accumulates per generated token with ``context`` tokens in the cache, output head and routers included.

    Of experts those that the token goes through count.
    """

    context: int = 0
    unit: ClassVar[str] = "macs"

    def __post_init__(self) -> None:
        _check(context=self.context)

    def module(self, sizes: LayerUnits, module: str, kept: Tensor) -> Tensor:
        products = 2 * sizes.group * sizes.head_dim * self.context if module == "attention" else 0
        return kept * float(sizes.unit_weights(module) + products) * sizes.used_share(module)

    def outside(self, units: Units) -> float:
        return float(units.head_parameters + sum(layer.router_weights for layer in units.layers))


@dataclass(frozen=True)
class Bytes(Resource):
    """Bytes of the weights and of a KV cache of ``context`` tokens for ``batch`` sequences, all of one type."""

    bytes_per_value: float = 2.0
    context: int = 0
    batch: int = 1
    unit: ClassVar[str] = "bytes"

    def __post_init__(self) -> None:
        _check(context=self.context, batch=self.batch, bytes_per_value=self.bytes_per_value)
        if not self.bytes_per_value:
            raise ValueError("bytes_per_value must be positive; got 0")

    def module(self, sizes: LayerUnits, module: str, kept: Tensor) -> Tensor:
        cached = 2 * sizes.head_dim * self.context * self.batch if module == "attention" else 0
        return kept * ((sizes.unit_parameters(module) + cached) * self.bytes_per_value)

    def outside(self, units: Units) -> float:
        return super().outside(units) * self.bytes_per_value


@dataclass(frozen=True)
class Latency(Resource):
    """Seconds of one forward pass, interpolated in a table that was measured on a device (``saap.latency``).

    The device was checked when the table was read (``LatencyTable.load``). Pruning warns when the model's dtype is
    not the table's.
    """

    table: LatencyTable
    unit: ClassVar[str] = "latency"

    def module(self, sizes: LayerUnits, module: str, kept: Tensor) -> Tensor:
        return self.table.seconds(module, kept)

    def outside(self, units: Units) -> float:
        return self.table.rest

    def check(self, units: Units) -> None:
        self.table.check_units(units)

    def warn_of_dtype(self, dtype: torch.dtype) -> None:
        self.table.warn_of_dtype(dtype)

    def settings(self) -> dict[str, Any]:
        table = self.table
        names = ("device", "dtype", "tokens", "context")
        return {"resource": self.unit} | {name: getattr(table, name) for name in names}


def _check(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative; got {value}")


def named_resource(resource: "str | Resource") -> Resource:
    """A resource by its name with default settings, or the given one; ValueError for other names."""
    if isinstance(resource, Resource):
        return resource
    known = {"parameters": Parameters, "macs": Macs, "bytes": Bytes}
    if resource not in known:
        hint = "; latency needs a table: saap.resources.Latency(saap.LatencyTable.load(FILE))"
        raise ValueError(
            f"resource must be one of {', '.join(known)} or a saap.resources.Resource; got {resource!r}{hint}"
        )
    return known[resource]()
