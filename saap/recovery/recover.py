"""``saap.recover``: quantise, attach what learns, train, merge."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.recovery.settings import Settings
from saap.recovery.trainer import History

Progress = Callable[[int, int], Any]


@dataclass(frozen=True)
class Recovered:
    """The model, merged and quantised, and how its training went."""

    model: PreTrainedModel
    settings: Settings
    history: History


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Any,
    *,
    teacher: PreTrainedModel | None = None,
    held_out: Any = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    said: Callable[[int, float], Any] | None = None,
    **settings: Any,
) -> Recovered:
    """Tune a pruned ``model`` on ``data``, in place; ``settings`` are those of ``Settings``."""
    raise NotImplementedError
