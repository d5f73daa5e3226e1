"""A pruning plan: which units each layer keeps, as JSON that a person can read, edit and apply."""

import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saap.experts import GROUPED_MULTIPLE
from saap.serving.targets import check_model, size_rule
from saap.units import LayerUnits, Units, module_of
from saap.version import __version__

PLAN_FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """Units one layer keeps, ascending, numbered as in the model the plan was made for.

    In a mixture of experts ``channels`` are numbered through all experts, expert by expert, and ``experts`` are
    those kept, all by default: each of them with equally many channels.
    """

    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    experts: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Width of the MLP that is left, or of each expert."""
        return len(self.channels) // max(1, len(self.experts))

    def channels_by_expert(self, sizes: LayerUnits) -> Tensor:
        """Channels of every kept expert, numbered within it: (experts, width) int64."""
        channels = torch.tensor(self.channels, dtype=torch.long).view(len(self.experts), -1)
        return channels - torch.tensor(self.experts)[:, None] * sizes.intermediate_size

    def features(self, part: str, sizes: LayerUnits) -> Tensor:
        """Rows of a part's weight that stay, or columns of o and down: ascending, int64."""
        units = torch.tensor(self.kv_heads if module_of(part) == "attention" else self.channels, dtype=torch.long)
        width = sizes.rows_per_unit(part)
        return (units[:, None] * width + torch.arange(width)).flatten()


@dataclass(frozen=True)
class Plan:
    """Kept units of every layer, the model they belong to, and how they were chosen."""

    units: Units
    layers: tuple[LayerPlan, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.units.layers):
            raise ValueError(f"expected a plan for {len(self.units.layers)} layers, got {len(self.layers)}")
        if any(
            sizes.experts and not layer.experts for layer, sizes in zip(self.layers, self.units.layers, strict=True)
        ):
            object.__setattr__(self, "layers", tuple(map(_with_experts, self.layers, self.units.layers)))
        target = self.settings.get("target")
        rule = size_rule(target, self.settings.get("tensor_parallel", 1))
        for index, (layer, sizes) in enumerate(zip(self.layers, self.units.layers, strict=True)):
            empty = bool(self.settings.get("allow_empty"))
            _check_kept(layer.kv_heads, sizes.kv_heads, f"layer {index}: kv_heads", empty)
            _check_kept(layer.channels, sizes.count("mlp"), f"layer {index}: channels", empty)
            if sizes.experts or layer.experts:
                _check_experts(layer, sizes, f"layer {index}")
            rule.check(sizes, index, "attention", len(layer.kv_heads))
            rule.check(sizes, index, "mlp", layer.width)
        if target is not None:
            alike = len({(layer.width, len(layer.experts)) for layer in self.layers}) == 1
            check_model(target, self.units, uniform=self.uniform, alike=alike)
        for index in self.units.anchors:
            if self.units.layers[index].kv_heads and not self.layers[index].kv_heads:
                raise ValueError(
                    f"layer {index}: expected at least one KV head to be kept, got none: caches count positions there"
                )

    @property
    def uniform(self) -> bool:
        """Whether every layer ends up with the same sizes."""
        return len({(len(layer.kv_heads), layer.width, len(layer.experts)) for layer in self.layers}) == 1

    @property
    def removed_parameters(self) -> int:
        return sum(
            (sizes.kv_heads - len(layer.kv_heads)) * sizes.unit_parameters("attention")
            + (sizes.count("mlp") - len(layer.channels)) * sizes.unit_parameters("mlp")
            + (sizes.experts - len(layer.experts)) * sizes.hidden_size  # rows of the router
            for layer, sizes in zip(self.layers, self.units.layers, strict=True)
        )

    @property
    def ratio(self) -> float:
        """Share of all parameters that the plan removes."""
        return self.removed_parameters / self.units.total_parameters

    @property
    def block_ratio(self) -> float:
        """Share of the decoder layers' parameters that the plan removes."""
        return self.removed_parameters / self.units.block_parameters

    def then(self, later: "Plan") -> "Plan":
        """This plan followed by ``later``, made for the model that it leaves; numbered as in this plan's model."""
        left = [(len(layer.kv_heads), layer.width, len(layer.experts)) for layer in self.layers]
        if left != [(sizes.kv_heads, sizes.intermediate_size, sizes.experts) for sizes in later.units.layers]:
            raise ValueError("expected a plan made for the model that the first plan leaves, got one of other sizes")
        layers = (
            LayerPlan(
                tuple(mine.kv_heads[i] for i in theirs.kv_heads),
                tuple(mine.channels[i] for i in theirs.channels),
                tuple(mine.experts[i] for i in theirs.experts),
            )
            for mine, theirs in zip(self.layers, later.layers, strict=True)
        )
        return Plan(self.units, tuple(layers), later.settings)

    def check_model(self, units: Units) -> None:
        """Raise ValueError unless ``units`` describe the model this plan was made for."""
        self.units.check_same(units, "this plan was made for")

    def to_json(self) -> str:
        kept = self.units.total_parameters - self.removed_parameters
        body = {
            "format": PLAN_FORMAT,
            "written_by": f"saap {__version__}",
            "family": self.units.family,
            "fingerprint": self.units.fingerprint,
            "anchors": self.units.anchors,
            "parameters": {
                "dense": self.units.total_parameters,
                "pruned": kept,
                "blocks_dense": self.units.block_parameters,
                "head": self.units.head_parameters,
                "removed_share": round(self.ratio, 6),
                "removed_share_of_blocks": round(self.block_ratio, 6),
            },
            "settings": self.settings,
            "layers": [
                {
                    "sizes": _sizes_to_json(sizes),
                    "kv_heads": f"{len(layer.kv_heads)} of {sizes.kv_heads}",
                    "kv_heads_kept": to_ranges(layer.kv_heads),
                    **_experts_to_json(layer, sizes),
                    "channels": f"{len(layer.channels)} of {sizes.count('mlp')}",
                    "channels_kept": to_ranges(layer.channels),
                }
                for layer, sizes in zip(self.layers, self.units.layers, strict=True)
            ],
        }
        return json.dumps(body, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> "Plan":
        """Read what ``to_json`` wrote; only the ``*_kept`` ranges of a layer are meant to be edited."""
        try:
            body = json.loads(text)
            if body["format"] != PLAN_FORMAT:
                raise ValueError(f"{source}: expected plan format {PLAN_FORMAT}, got {body['format']!r}")
            units = Units(
                family=body["family"],
                layers=tuple(_sizes_from_json(row["sizes"]) for row in body["layers"]),
                total_parameters=body["parameters"]["dense"],
                block_parameters=body["parameters"]["blocks_dense"],
                fingerprint=body["fingerprint"],
                head_parameters=body["parameters"].get("head", 0),
                anchors=tuple(body.get("anchors", (0,))),
            )
            layers = tuple(
                LayerPlan(
                    from_ranges(row["kv_heads_kept"], f"layer {index}: kv_heads_kept"),
                    from_ranges(row["channels_kept"], f"layer {index}: channels_kept"),
                    from_ranges(row.get("experts_kept", ""), f"layer {index}: experts_kept"),
                )
                for index, row in enumerate(body["layers"])
            )
            return cls(units, layers, body["settings"])
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not valid JSON: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source} lacks or misshapes the field {error} of a SAAP plan") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan atomically."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        return cls.from_json(Path(path).read_text(encoding="utf-8"), source=str(path))


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` never holds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def to_ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    pieces: list[str] = []
    start = previous = None
    for index in (*indices, None):
        if start is not None and previous is not None and index != previous + 1:
            pieces.append(f"{start}" if start == previous else f"{start}-{previous}")
            start = None
        if start is None:
            start = index
        previous = index
    return ",".join(pieces)


def from_ranges(text: str, name: str = "ranges") -> tuple[int, ...]:
    """ "0-2,5" -> (0, 1, 2, 5)."""
    if not isinstance(text, str):
        raise ValueError(f'{name}: expected a string of ranges such as "0-31,40", got {text!r}')
    indices: list[int] = []
    for piece in filter(None, text.replace(" ", "").split(",")):
        first, _, last = piece.partition("-")
        if not (first.isdigit() and (last.isdigit() or not last)):
            raise ValueError(f'{name}: expected ranges such as "0-31,40", got {piece!r}')
        indices.extend(range(int(first), int(last or first) + 1))
    return tuple(indices)


def _check_kept(kept: tuple[int, ...], count: int, name: str, empty: bool) -> None:
    if any(b <= a for a, b in zip(kept, kept[1:], strict=False)):
        raise ValueError(f"{name} must be increasing and without repeats")
    if kept and (kept[0] < 0 or kept[-1] >= count):
        raise ValueError(f"{name} must lie in 0 to {count - 1}; got {kept[0]} to {kept[-1]}")
    if count and not kept and not empty:
        raise ValueError(
            f'{name}: expected at least one unit to be kept, got none; settings may say "allow_empty": true'
        )


def _with_experts(layer: LayerPlan, sizes: LayerUnits) -> LayerPlan:
    """The layer with all experts where it names none."""
    return replace(layer, experts=layer.experts or tuple(range(sizes.experts)))


def _check_experts(layer: LayerPlan, sizes: LayerUnits, name: str) -> None:
    _check_kept(layer.experts, sizes.experts, f"{name}: experts", empty=False)
    if len(layer.experts) < sizes.experts_per_token:
        raise ValueError(
            f"{name}: expected at least the {sizes.experts_per_token} experts that a token goes through, "
            f"got {len(layer.experts)}"
        )
    owners = torch.tensor(layer.channels, dtype=torch.long) // sizes.intermediate_size
    counts = torch.bincount(owners, minlength=sizes.experts)
    gone = torch.isin(owners, torch.tensor(layer.experts), invert=True)
    if gone.any():
        first = int(gone.int().argmax())
        raise ValueError(
            f"{name}: channel {layer.channels[first]} is of expert {int(owners[first])}, which is not kept"
        )
    found = dict(zip(layer.experts, counts[list(layer.experts)].tolist(), strict=True))
    if len(set(found.values())) != 1 or not layer.channels:
        raise ValueError(f"{name}: expected equally many channels of every kept expert, at least one, got {found}")
    if layer.width != sizes.intermediate_size and layer.width % GROUPED_MULTIPLE:
        raise ValueError(
            f"{name}: expected a multiple of {GROUPED_MULTIPLE} channels per expert, which transformers' grouped "
            f"products need, got {layer.width}"
        )


def _experts_to_json(layer: LayerPlan, sizes: LayerUnits) -> dict[str, str]:
    if not sizes.experts:
        return {}
    return {
        "experts": f"{len(layer.experts)} of {sizes.experts}",
        "experts_kept": to_ranges(layer.experts),
        "channels_per_expert": f"{layer.width} of {sizes.intermediate_size}",
    }


def _sizes_to_json(sizes: LayerUnits) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in LayerUnits.__dataclass_fields__}


def _sizes_from_json(row: dict[str, Any]) -> LayerUnits:
    return LayerUnits(**{**row, "biases": tuple(row["biases"])})
