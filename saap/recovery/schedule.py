"""When a recovery does what: its steps and micro-batches, the order of its text, the course of its learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from saap.recovery.settings import Settings

EVALUATIONS = 10  # in all, where the settings do not say when


@dataclass(frozen=True)
class Schedule:
    """Steps, and how a step's batch is cut: ``accumulation`` micro-batches in each of the processes."""

    steps: int
    micro_batch: int
    accumulation: int
    every: int  # steps between evaluations

    @classmethod
    def of(cls, settings: Settings, sequences: int, processes: int) -> "Schedule":
        """Raises ValueError for a batch that the processes cannot share, and a budget of tokens below one step's."""
        batch = settings.batch_size
        if batch % processes or batch // processes % (settings.micro_batch or 1):
            raise ValueError(
                f"expected a batch_size that {processes} processes with micro-batches of "
                f"{settings.micro_batch or 'any size'} divide, got {batch}"
            )
        steps = math.ceil(settings.epochs * sequences / batch)
        if settings.tokens is not None:
            steps = min(steps, settings.tokens // (batch * settings.seq_len))
            if not steps:
                raise ValueError(
                    f"tokens: expected at least those of one step, {batch} x {settings.seq_len} = "
                    f"{batch * settings.seq_len}, got {settings.tokens}"
                )
        micro = settings.micro_batch or batch // processes
        every = settings.evaluate_every or math.ceil(steps / EVALUATIONS)
        return cls(steps, micro, batch // processes // micro, every)


def order_of(sequences: int, wanted: int, seed: int) -> list[int]:
    """Numbers of the sequences to train on, one after the other: every one once in another order, then again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(sequences, generator=generator).tolist()
    return order[:wanted]


def rise_and_fall(warmup: int, steps: int) -> Callable[[int], float]:
    """Shares of the learning rate: up to 1 at the last of ``warmup`` steps, then half a cosine towards 0."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return share
