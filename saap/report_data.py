"""What a report holds, as plain values: no tensors, no model."""

from dataclasses import asdict, dataclass, field
from typing import Any

from saap.charts import HeatRows, Point
from saap.version import __version__


@dataclass(frozen=True)
class Fact:
    """One headline figure; ``unit`` is "count", "bytes", "perplexity" or "tokens/s"."""

    label: str
    before: float
    after: float
    unit: str


@dataclass(frozen=True)
class Widths:
    """How many ``name`` (KV heads, MLP channels) every layer has before and after."""

    name: str
    before: list[int]
    after: list[int]


@dataclass(frozen=True)
class ModuleScores:
    """Importance of one module's units: a heat map's rows, and some (importance, fluctuation, kept) of ``units``."""

    name: str
    heat: HeatRows
    points: list[Point]
    units: int


@dataclass(frozen=True)
class Losses:
    """How a training went: ``training`` losses, which are ``of`` something, by step, and (step, loss) of held-out text.

    ``best`` is the step whose parameters were taken.
    """

    of: str
    training: list[float]
    held_out: list[tuple[int, float]]
    best: int


@dataclass(frozen=True)
class Report:
    """Everything a report shows, as values that JSON can hold; sections without data are left out.

    ``names`` are those of the model before and after; ``evaluations`` hold (name, Evaluation as a dict), the
    model that the others are compared with first; ``settings`` are {section: {name: value}} and ``timings``
    seconds by stage. ``losses`` are those of a model that was trained; ``width_names`` stand for ``names`` beside
    widths, where those are of other models.
    """

    title: str
    summary: str
    names: tuple[str, str]
    facts: list[Fact]
    widths: list[Widths]
    scores: list[ModuleScores] = field(default_factory=list)
    criterion: str = ""
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    losses: Losses | None = None
    width_names: tuple[str, str] | None = None
    made: str = ""
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
