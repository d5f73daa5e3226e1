"""What each runtime asks of a model's sizes: rules for the search, and for checking what was made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A runtime that a pruned model is made for; ``multiple`` is of MLP widths."""

    name: str
    title: str
    multiple: int


TARGETS: Mapping[str, Target] = {}


def search_options(target: str, **given: Any) -> dict[str, Any]:
    """The options of ``search`` with what ``target`` asks for; ValueError where ``given`` contradicts it."""
    raise NotImplementedError
