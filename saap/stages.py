"""One count of progress over everything that pruning in steps does."""

from collections.abc import Callable
from functools import partial

from saap.micro_batches import Progress

DOING = {
    "calibrate": "calibrating", "score": "scoring", "compensate": "compensating", "prune": "pruning",
    "recover": "recovering",
}  # fmt: skip


class Stages:
    """The progress of each stage of each step as its share of that of all; the stage's own if there is only one.

    ``kinds`` are those of every step, in order, and ``given`` says that the first is not needed. ``title`` hears
    what is going on, such as "step 2 of 4: calibrating".
    """

    def __init__(
        self,
        steps: int,
        kinds: tuple[str, ...],
        given: bool,
        progress: Progress | None = None,
        title: Callable[[str], None] | None = None,
    ) -> None:
        self.steps, self.progress, self.title = steps, progress, title
        every = [(step, kind) for step in range(1, steps + 1) for kind in kinds]
        self.stages = every[1:] if given else every

    def of(self, step: int, kind: str) -> Progress | None:
        """The progress of a stage that begins; what is before it counts as done."""
        self.say(step, kind)
        if self.progress is None or len(self.stages) <= 1:
            return self.progress
        begun = partial(self._report, self.stages.index((step, kind)))
        begun(0, 1)
        return begun

    def say(self, step: int, kind: str) -> None:
        """Tell what is going on."""
        if self.title is not None:
            self.title(f"step {step} of {self.steps}: {DOING[kind]}" if self.steps > 1 else DOING[kind])

    def _report(self, stage: int, done: int, total: int) -> None:
        assert self.progress is not None  # or nothing would be reported
        self.progress(int(1000 * (stage + done / total)), 1000 * len(self.stages))

    def end(self) -> None:
        """All is done, stages that were not needed included."""
        if self.progress is not None and len(self.stages) > 1:
            self.progress(1000 * len(self.stages), 1000 * len(self.stages))
