"""Calibration statistics: everything a criterion needs, independent of ratio, criterion and search."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saap.moments import Moments
from saap.units import MODULES, Units

STATISTICS_FORMAT = "saap-statistics-2"
ORDERS = ("first", "second", "mixed")
COUPLED = (*ORDERS, "vector")  # of the coupled form
AGGREGATES = ("joint", "sum", "mask")  # rows behind the matrices: of the whole unit, summed over them, of its mask


@dataclass
class ModuleStatistics:
    """Statistics of all attention or all MLP units of a model, layers one after another.

    With M coupled matrices, P = M + 3 rows, U units and C input features of o or down. The rows are the matrices,
    where the vector-wise importance is that of each row or column, summed over the unit's; "joint", of
    the signed sum over the whole unit; "sum" over the matrices; "mask", of the signed sum over the unit's part of the
    last matrix, which is the gradient of a mask on the unit:

    - ``salience``: Moments of (3, P, U) over sequences: orders first, second, mixed of the vector-wise (IV) and
      element-wise (IE) importance, method section 2a; the cross moment of any two orders is (3, 3, P, U).
    - ``signed``: (M, U) mean over sequences of a[u, n], the signed first-order sum.
    - ``weight_l1``, ``weight_square``: (M, U) sum of |w| and of w^2 over the unit, biases included.
    - ``coupled``: (4, M, U) sum over the unit of |mean_n s|, |mean_n s^2| and |mean_n s - mean_n s^2 / 2|, and over its
      rows or columns of |mean_n a|, or None. Exact for the sequences of one backward pass only, so it is
      neither accumulated nor merged.
    - ``input_mean``, ``input_m2``, ``input_absmax``: (C,) of the input of o or down over tokens.
    - ``input_activity``: (C,) mean over sequences of the squared mean over tokens of |x|.
    - ``column_l1``, ``column_square``: (C,) sum of |w| and of w^2 over each column of o or down.
    """

    matrices: tuple[str, ...]
    salience: Moments
    signed: Tensor
    weight_l1: Tensor
    weight_square: Tensor
    input_mean: Tensor
    input_m2: Tensor
    input_absmax: Tensor
    input_activity: Tensor
    column_l1: Tensor
    column_square: Tensor
    coupled: Tensor | None = None

    PER_UNIT = ("signed", "weight_l1", "weight_square")
    PER_FEATURE = ("input_mean", "input_m2", "input_absmax", "input_activity", "column_l1", "column_square")
    WEIGHTS = ("weight_l1", "weight_square", "column_l1", "column_square")  # no data in them

    @classmethod
    def zeros(cls, matrices: tuple[str, ...], units: int, features: int) -> "ModuleStatistics":
        rows = len(matrices) + len(AGGREGATES)
        per_unit = [torch.zeros(len(matrices), units, dtype=torch.float64) for _ in cls.PER_UNIT]
        per_feature = [torch.zeros(features, dtype=torch.float64) for _ in cls.PER_FEATURE]
        return cls(matrices, Moments.zeros((len(ORDERS), rows, units)), *per_unit, *per_feature)

    @property
    def rows(self) -> tuple[str, ...]:
        return self.matrices + AGGREGATES

    def tensors(self) -> dict[str, Tensor]:
        plain = {name: getattr(self, name) for name in self.PER_UNIT + self.PER_FEATURE}
        if self.coupled is not None:
            plain["coupled"] = self.coupled
        return plain | {f"salience.{name}": tensor for name, tensor in self.salience.tensors().items()}

    def select(self, units: Tensor, features: Tensor) -> "ModuleStatistics":
        """A copy of the given units and features, each (n,) int64; without coupled sums."""
        fields = {name: getattr(self, name)[:, units] for name in self.PER_UNIT}
        fields |= {name: getattr(self, name)[features] for name in self.PER_FEATURE}
        return ModuleStatistics(self.matrices, self.salience.select(units), **fields)

    def merge_(self, other: "ModuleStatistics", tokens: int, other_tokens: int) -> None:
        """Add the sequences and tokens of ``other``; the weights' norms stay."""
        total = self.salience.count + other.salience.count
        if total:
            share = other.salience.count / total
            self.signed += (other.signed - self.signed) * share
            self.input_activity += (other.input_activity - self.input_activity) * share
        merge_feature_moments(self.input_mean, self.input_m2, tokens, other.input_mean, other.input_m2, other_tokens)
        torch.maximum(self.input_absmax, other.input_absmax, out=self.input_absmax)
        self.salience.merge_(other.salience)


def merge_feature_moments(
    mean: Tensor, m2: Tensor, count: int, other_mean: Tensor, other_m2: Tensor, other_count: int
) -> None:
    """Merge two sets of per-feature token moments into the first (Chan, Golub and LeVeque 1983)."""
    if not other_count:
        return
    gap = other_mean - mean
    m2 += other_m2 + gap.square() * (count * other_count / (count + other_count))
    mean += gap * (other_count / (count + other_count))


@dataclass
class Statistics:
    """What calibration measured on one model; additive over sequences.

    ``influence`` (L,) is each decoder layer's block influence: the mean over tokens of 1 - cos(input, output).
    ``experts`` (2, X), X experts of all layers one after another: the mean over tokens of g ||f(x)||, the router's
    weight times the norm of the expert's output, 0 where the token went elsewhere, and the share of tokens that are
    routed to the expert; their ratio is REAP's criterion (Lasby et al., arXiv 2510.13999, equation 9).
    ``data`` holds a fingerprint of each merged calibration set, ``settings`` how it was made.
    """

    units: Units
    modules: dict[str, ModuleStatistics]
    influence: Tensor
    tokens: int = 0
    data: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    experts: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))

    @classmethod
    def zeros(cls, units: Units) -> "Statistics":
        gated = all(layer.gated for layer in units.layers)
        matrices = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down") if gated else ("up", "down")}
        features = {
            "attention": sum(layer.query_heads * layer.head_dim for layer in units.layers),
            "mlp": units.count("mlp"),
        }
        modules = {m: ModuleStatistics.zeros(matrices[m], units.count(m), features[m]) for m in MODULES}
        influence = torch.zeros(len(units.layers), dtype=torch.float64)
        return cls(units, modules, influence, experts=torch.zeros(2, units.expert_offsets()[-1], dtype=torch.float64))

    def unrouted(self) -> dict[int, tuple[int, ...]]:
        """{layer: its experts that no token was routed to}, of layers that have some."""
        shares = self.experts[1].split([layer.experts for layer in self.units.layers])
        found = {index: tuple((share == 0).nonzero().flatten().tolist()) for index, share in enumerate(shares)}
        return {index: experts for index, experts in found.items() if experts}

    @property
    def sequences(self) -> int:
        return self.modules["mlp"].salience.count

    @property
    def coupled(self) -> bool:
        """Whether LLM-Pruner's coupled salience was measured too."""
        return all(module.coupled is not None for module in self.modules.values())

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both calibration sets together.

        Raises ValueError when the two belong to different models or share calibration data.
        """
        if other.units.fingerprint != self.units.fingerprint:
            raise ValueError(
                f"expected statistics of one model, got fingerprints {self.units.fingerprint} "
                f"and {other.units.fingerprint}"
            )
        if any(m.coupled is not None for part in (self, other) for m in part.modules.values()):
            raise ValueError("coupled statistics are exact for one backward pass only and cannot be merged")
        shared = set(self.data) & set(other.data)
        if shared:
            raise ValueError(f"both statistics cover the same calibration data ({', '.join(sorted(shared))})")
        merged = Statistics.zeros(self.units)
        for part in (self, other):
            for name, module in merged.modules.items():
                if part is self:
                    for weights in ModuleStatistics.WEIGHTS:
                        setattr(module, weights, getattr(part.modules[name], weights))
                module.merge_(part.modules[name], merged.tokens, part.tokens)
            merged.tokens += part.tokens
            if part.tokens:
                for mine, theirs in ((merged.influence, part.influence), (merged.experts, part.experts)):
                    mine += (theirs - mine) * (part.tokens / merged.tokens)
        merged.data = tuple(sorted(self.data + other.data))
        merged.settings = self.settings | {"merged": len(merged.data)}
        return merged

    def check_model(self, units: Units) -> None:
        """Raise ValueError unless ``units`` describe the model these statistics were measured on."""
        self.units.check_same(units, "these statistics belong to")

    def data_fingerprint(self) -> str:
        return hashlib.sha256("".join(self.data).encode()).hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        path = Path(path)
        tensors = {
            f"{name}.{key}": tensor.contiguous()
            for name, module in self.modules.items()
            for key, tensor in module.tensors().items()
        } | {"influence": self.influence}
        tensors |= {"experts": self.experts} if self.experts.numel() else {}
        description = {
            "format": STATISTICS_FORMAT,
            "units": self.units.to_json(),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "data": self.data,
            "settings": self.settings,
        }
        metadata = {"saap": json.dumps(description)}  # one entry: safetensors writes several in random order
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Read what ``save`` wrote; raises ValueError when the file is damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("saap", "{}"))
                if metadata.get("format") != STATISTICS_FORMAT:
                    raise ValueError(f"{path}: expected {STATISTICS_FORMAT}, got format {metadata.get('format')!r}")
                statistics = cls.zeros(Units.from_json(metadata["units"]))
                saved = set(file.keys())
                for name, module in statistics.modules.items():
                    if f"{name}.coupled" in saved:
                        module.coupled = torch.zeros(len(COUPLED), *module.signed.shape, dtype=torch.float64)
                    for key, tensor in module.tensors().items():
                        stored = file.get_tensor(f"{name}.{key}")
                        if stored.shape != tensor.shape:
                            shapes = f"expected {name}.{key} of shape {tuple(tensor.shape)}, got {tuple(stored.shape)}"
                            raise ValueError(f"{path}: {shapes}")
                        owner, _, attribute = key.rpartition(".")
                        setattr(module.salience if owner else module, attribute, stored)
                    module.salience.count = metadata["sequences"]
                statistics.influence = file.get_tensor("influence")
                if "experts" in saved:
                    statistics.experts.copy_(file.get_tensor("experts"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        statistics.tokens = metadata["tokens"]
        statistics.data = tuple(metadata["data"])
        statistics.settings = metadata["settings"]
        return statistics
