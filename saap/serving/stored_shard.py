"""How the stored tensors of Linears fall onto one device's share of a Linear that may be several of them in one."""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saap.stored_weight import stored_shapes
from saap_kernels.packed import GROUP_MULTIPLE

Shard = Hashable  # "q", "k", "v", an index, or indices that follow each other; None: the whole Linear


def group_of_share(name: str, columns: int, share: int, group_size: int) -> int:
    """The group size that suits ``share`` of a weight's ``columns``: the stored one, or one that divides it.

    Raises ValueError where the first column of some share would lie within every such group.
    """
    if share == columns:
        return group_size
    size = math.gcd(share, group_size)
    if size % GROUP_MULTIPLE:
        raise ValueError(
            f"{name}: {columns // share} devices would take {share} of {columns} columns each, which cuts groups of "
            f"{group_size}; expected shares that are a multiple of {GROUP_MULTIPLE}"
        )
    return size


def shard_rows(layer: Any) -> dict[Shard, int]:
    """Rows that a checkpoint's tensor has, by shard, of one of vLLM's Linears."""
    if hasattr(layer, "total_num_kv_heads"):
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        values = getattr(layer, "v_head_size", layer.head_size)
        rows: dict[Shard, int] = {"q": heads * layer.head_size, "k": kv_heads * layer.head_size, "v": kv_heads * values}
    else:
        rows = dict(enumerate(getattr(layer, "output_sizes", None) or [layer.output_size]))
    return rows | {None: sum(rows.values())}


@dataclass
class Placement:
    """Checks what a checkpoint brings for the Linear ``name`` of ``columns`` and counts it.

    ``rows`` are those of its shards; ``group_size`` is that of one device's share, ``stored_group`` the checkpoint's.
    """

    name: str
    rows: dict[Shard, int]
    columns: int
    bits: int
    stored_group: int
    group_size: int
    placed: Counter[str] = field(default_factory=Counter)

    def loader(self, kind: str, load: Callable[..., None]) -> Callable[..., None]:
        """``load``, vLLM's own loader of a parameter, for the tensor ``kind`` of ``NAMES``."""

        def checked(parameter: Any, loaded: Tensor, *shard: Any, **options: Any) -> None:
            which = shard[0] if shard else options.get("loaded_shard_id")
            load(parameter, self.take(kind, loaded, which), *shard, **options)

        return checked

    def take(self, kind: str, loaded: Tensor, shard: Shard = None) -> Tensor:
        """A stored tensor, its groups cut to those of one device; ValueError unless it is one that is expected."""
        parts = shard if isinstance(shard, tuple) else (shard,)
        expected = stored_shapes((sum(self.rows[part] for part in parts), self.columns), self.bits, self.stored_group)
        quantised = torch.int8 if self.bits == 8 else torch.uint8
        right = loaded.dtype == quantised if kind == "qweight" else loaded.is_floating_point()
        if tuple(loaded.shape) != expected[kind] or not right:
            of = "" if shard is None else f" (part {shard})"
            wanted = quantised if kind == "qweight" else "floating-point numbers"
            raise ValueError(
                f"{self.name}{of}: expected {kind} {expected[kind]} of {wanted} for {self.bits} bits in groups of "
                f"{self.stored_group}, got {tuple(loaded.shape)} of {loaded.dtype}"
            )
        self.placed[kind] += len(loaded)
        if kind == "qweight" or self.group_size == self.stored_group:
            return loaded
        groups = -(-self.columns // self.group_size)
        return loaded.repeat_interleave(self.stored_group // self.group_size, 1)[:, :groups]

    def check_complete(self) -> None:
        """Raise ValueError unless every row of all three tensors was taken."""
        for kind in stored_shapes((1, 1), self.bits, self.stored_group):
            if self.placed[kind] != self.rows[None]:
                raise ValueError(
                    f"{self.name}: expected {self.rows[None]} rows of {kind} in the checkpoint, got {self.placed[kind]}"
                )
