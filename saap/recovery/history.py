"""What became of a training, and what its log says of when to stop and which step to take."""

from dataclasses import dataclass

Log = list[dict[str, float]]


@dataclass(frozen=True)
class Evaluated:
    """Of held-out text after ``step`` steps: mean next-token loss."""

    step: int
    loss: float


@dataclass(frozen=True)
class History:
    """``losses`` of every step, by the objective; ``evaluations``; ``best`` is the step whose parameters were taken.

    ``planned`` steps there were to be; of fewer the training ``stopped_early``, out of patience, or was ``cut_short``.
    """

    losses: list[float]
    evaluations: list[Evaluated]
    best: int
    planned: int
    stopped_early: bool
    tokens: int  # trained on, with repetitions
    seconds: float  # of training and evaluation, before a resume too

    @property
    def cut_short(self) -> bool:
        """Whether it was finished from a checkpoint on the way, with ``finish``."""
        return len(self.losses) < self.planned and not self.stopped_early

    @classmethod
    def of(cls, log: Log, planned: int, step_tokens: int, patience: int | None) -> "History":
        """From a trainer's ``log``, which ends where the training did."""
        losses = [entry["loss"] for entry in log if "loss" in entry]
        seconds = [entry["seconds"] for entry in log if "seconds" in entry]
        return cls(
            losses=losses,
            evaluations=[Evaluated(step, loss) for step, loss in evaluated(log)],
            best=best_step(log, len(losses)),
            planned=planned,
            stopped_early=len(losses) < planned and out_of_patience(log, patience),
            tokens=len(losses) * step_tokens,
            seconds=seconds[-1] if seconds else 0.0,
        )


def evaluated(log: Log) -> list[tuple[int, float]]:
    """(step, held-out loss) of every evaluation in a trainer's log."""
    return [(int(entry["step"]), entry["eval_loss"]) for entry in log if "eval_loss" in entry]


def best_step(log: Log, last: int) -> int:
    """The step of the lowest held-out loss up to the ``last``, the earliest of them; without such text the ``last``."""
    found = [each for each in evaluated(log) if each[0] <= last]
    return min(found, key=lambda each: each[1], default=(last, 0.0))[0]


def out_of_patience(log: Log, patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations were none of them the best."""
    found = evaluated(log)
    if patience is None or not found:
        return False
    steps = [step for step, _ in found]
    return steps.index(best_step(log, steps[-1])) < len(steps) - patience
