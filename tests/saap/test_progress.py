"""What progress says: one count and one bar over everything that a ratio takes, with the stage in its title."""

import io
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from saap import console
from saap.calibrate import calibrate
from saap.stages import Stages
from saap.steps import prune_in_steps
from saap.units import discover
from tests.saap.command_line import run
from tests.saap.test_calibrate import token_ids
from tests.saap.test_cli import prune, workplace  # noqa: F401  # a fixture
from tests.saap.test_steps import CALIBRATION, recipe
from tests.saap.tiny import tiny_model

Event = tuple[int, int] | str


class Recorded:
    """A bar that keeps what it was told."""

    def __init__(self, title: str, unit: str | None) -> None:
        self.unit = unit
        self.events: list[Event] = [title]

    def __call__(self, done: int, total: int) -> None:
        self.events.append((done, total))

    def say(self, title: str) -> None:
        if title != self.titles[-1]:
            self.events.append(title)

    @property
    def titles(self) -> list[str]:
        return [event for event in self.events if isinstance(event, str)]

    @property
    def counts(self) -> list[tuple[int, int]]:
        return [event for event in self.events if not isinstance(event, str)]


@pytest.fixture
def bars(monkeypatch) -> list[Recorded]:
    made: list[Recorded] = []

    @contextmanager
    def progress(title: str, unit: str | None, shown: bool = True):
        made.append(Recorded(title, unit))
        yield made[-1]

    monkeypatch.setattr(console, "progress", progress)
    return made


def titles_of(steps: int, *stages: str) -> list[str]:
    return [f"step {step} of {steps}: {stage}" for step in range(1, steps + 1) for stage in stages]


@pytest.mark.parametrize("given", [False, True])
def test_steps_name_every_stage_and_know_their_total_from_the_start(given: bool) -> None:
    model, bar = tiny_model("llama", torch.float32), Recorded("", None)
    made = recipe(3, compensate="bias")
    statistics = calibrate(model, data=token_ids(4), **CALIBRATION) if given else None
    stages = Stages(made.steps, made.kinds(discover(model)), given, bar, bar.say)
    prune_in_steps(model, None, token_ids(4), 0.3, made, statistics=statistics, progress=stages)
    titles = titles_of(3, "calibrating", "pruning", "compensating", "pruning")
    assert bar.titles[1:] == titles[given:]
    first = next(event for event in bar.events if not isinstance(event, str))
    assert first == (0, 6000 - 1000 * given) and {total for _, total in bar.counts} == {first[1]}
    assert bar.counts == sorted(bar.counts) and bar.counts[-1] == (first[1], first[1])
    begun = bar.events[bar.events.index("step 2 of 3: compensating") + 1]
    assert begun == (3000 - 1000 * given, first[1])  # its share of the bar begins where its title does


def test_what_a_stage_of_one_step_counts_is_its_own_work() -> None:
    model, bar = tiny_model("llama"), Recorded("", None)
    made = recipe(1)
    stages = Stages(made.steps, made.kinds(discover(model)), False, bar, bar.say)
    prune_in_steps(model, None, token_ids(4), 0.3, made, progress=stages)
    assert bar.titles[1:] == ["calibrating", "pruning"] and bar.counts == [(4, 4)]


@pytest.mark.parametrize("steps", [1, 2])
def test_one_ratio_has_one_bar(workplace, tmp_path, bars, steps: int) -> None:  # noqa: F811
    prune(workplace, "--ratio", 0.3, "--out", tmp_path / "o", "--steps", steps, "--compensate", "bias", "--no-report")
    stages = ("calibrating", "pruning", "compensating", "pruning")
    assert len(bars) == 1 and bars[0].unit is None
    assert bars[0].titles[1:] == (titles_of(steps, *stages) if steps > 1 else list(stages))
    assert {total for _, total in bars[0].counts} == {2000 * steps}


def test_a_sweep_shares_one_calibration_and_each_ratio_has_one_bar(workplace, tmp_path, bars) -> None:  # noqa: F811
    prune(workplace, "--ratio", "0.1,0.3", "--out", tmp_path / "o", "--steps", 2, "--no-report")
    assert [bar.titles[0] for bar in bars] == ["calibrating", "ratio-0.1, pruning", "ratio-0.3, pruning"]
    for bar, name in zip(bars[1:], ("ratio-0.1", "ratio-0.3"), strict=True):
        words = ("1 of 2: pruning", "2 of 2: calibrating", "2 of 2: pruning")
        assert bar.titles[1:] == [f"{name}, step {word}" for word in words]
        assert bar.counts[-1] == (4, 4) and bar.unit == "sequences"  # of the second step's calibration


def test_a_plan_with_compensation_has_one_bar_of_its_own_work(workplace, tmp_path, bars) -> None:  # noqa: F811
    prune(workplace, "--ratio", 0.3, "--out", tmp_path / "a", "--no-report")
    plan = ("--plan", tmp_path / "a/saap_plan.json", "--compensate", "bias", "--data", workplace / "text.txt")
    run("prune", workplace / "dense", *plan, "--out", tmp_path / "b", "--samples", 4, "--seq-len", 16, "--no-report")
    assert len(bars) == 2 and bars[0].unit == "sequences"
    assert bars[1].titles == ["pruning", "compensating", "pruning"] and bars[1].unit == "sequences x blocks"


def test_the_bar_shows_the_stage_as_it_is_written_and_a_share_or_a_rate(monkeypatch) -> None:
    for unit, shown in ((None, "25%"), ("sequences", "1/4")):
        written = io.StringIO()
        monkeypatch.setattr(console, "screen", Console(file=written, force_terminal=True, width=120))
        with console.progress("pruning", unit) as bar:
            bar(1, 4)
            bar.say("my[model], step 2 of 4: calibrating")
        assert "my[model], step 2 of 4: calibrating" in written.getvalue() and shown in written.getvalue()
        assert ("sequences/s" in written.getvalue()) is (unit is not None)
