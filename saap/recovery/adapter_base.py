"""What saved adapters belong to: the quantised weights and the plan of the model that they were made for."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saap.checkpoint_files import plan_in
from saap.compact import PLAN_ATTRIBUTE
from saap.plan import Plan
from saap.quantised_linear import QuantisedLinear
from saap.recovery.adapted_linear import AdaptedLinear
from saap.recovery.attach import quantised_linears
from saap_kernels import PackedWeight


@dataclass(frozen=True)
class BaseOfAdapters:
    """A quantised model in short.

    ``shapes`` {name: [N, K]} of its quantised Linears; ``plan`` a hash of the plan that pruned it, None where none is
    known; ``fingerprint`` a hash of all quantised weights, their scales and zero points rounded to bfloat16, so that a
    model in bf16 and in fp32 are the same.
    """

    bits: int
    group_size: int
    shapes: dict[str, list[int]]
    plan: str | None
    fingerprint: str

    @classmethod
    def of(cls, model: nn.Module) -> "BaseOfAdapters":
        """Reads every quantised weight once."""
        linears = quantised_linears(model)
        packed = {name: _base(module) for name, module in linears.items()}
        first = next(iter(packed.values()))
        assert first.group_size is not None
        shapes = {name: list(each.shape) for name, each in packed.items()}
        plan = _plan_of(model)
        return cls(
            first.bits, first.group_size, shapes, None if plan is None else plan_hash(plan), weights_hash(packed)
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: Path) -> "BaseOfAdapters":
        """Raises ValueError for anything but what ``to_dict`` gave."""
        kinds = {"bits": int, "group_size": int, "shapes": dict, "plan": str | None, "fingerprint": str}
        wrong = [name for name, kind in kinds.items() if name not in values or not isinstance(values[name], kind)]
        if wrong:
            raise ValueError(f"{file}: expected a valid base.{wrong[0]}, the file is damaged")
        return cls(**{name: values[name] for name in kinds})

    def check(self, model: nn.Module, folder: Path) -> None:
        """Raise ValueError unless the quantised ``model`` is this base; ``folder`` holds the adapters."""
        mine = BaseOfAdapters.of(model)
        if mine.group_size != self.group_size:
            raise ValueError(
                f"{folder}: expected adapters of groups of {mine.group_size}, as the model has, "
                f"got adapters of groups of {self.group_size}, which it cannot express"
            )
        if (mine.bits, mine.shapes, mine.fingerprint) == (self.bits, self.shapes, self.fingerprint):
            return
        if None not in (mine.plan, self.plan) and mine.plan != self.plan:
            raise ValueError(
                f"{folder}: these adapters belong to another plan: theirs is {self.plan}, the model's is {mine.plan}"
            )
        for name in sorted(mine.shapes.keys() | self.shapes.keys()):
            theirs, ours = (_size(each.shapes.get(name)) for each in (self, mine))
            if theirs != ours:
                raise ValueError(
                    f"{folder}: these adapters belong to another plan or base: {name} is {theirs} there and "
                    f"{ours} in the model"
                )
        raise ValueError(
            f"{folder}: these adapters belong to another base: theirs is int{self.bits} with fingerprint "
            f"{self.fingerprint}, the model is int{mine.bits} with {mine.fingerprint}"
        )


def plan_hash(plan: Plan) -> str:
    """Of what a plan keeps of which model, whatever it was made with."""
    kept = [(each.kv_heads, each.channels, each.experts) for each in plan.layers]
    return hashlib.sha256(f"{plan.units.fingerprint}{kept}".encode()).hexdigest()[:16]


def weights_hash(packed: dict[str, PackedWeight]) -> str:
    """Of quantised weights by name."""
    digest = hashlib.sha256()
    for name, each in packed.items():
        assert each.scale is not None and each.zero is not None
        digest.update(f"{name} {each.shape} {each.bits} {each.group_size}".encode())
        for tensor in (each.data, each.scale.bfloat16(), each.zero.bfloat16()):
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _plan_of(model: nn.Module) -> Plan | None:
    """That which pruned ``model``, or the one in the directory that it was loaded from."""
    plan: Plan | None = getattr(model, PLAN_ATTRIBUTE, None)
    name = getattr(model, "name_or_path", "")
    return plan_in(Path(name)) if plan is None and name else plan


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _base(module: QuantisedLinear) -> PackedWeight:
    return module.base if isinstance(module, AdaptedLinear) else module.packed


def _size(shape: list[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
