"""Geometry of the report's charts: where every mark goes. The template draws them as SVG."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from saap.axes import Axis, number, whole_ticks

WIDTH = 440.0  # user units of every chart; a phone shows one at about four fifths of that
SHADES = 9  # colours of a heat map
MOST_POINTS, MOST_DOTS = 400, 40  # of a curve: about one a unit; more dots would touch
LEFT, TOP, BOTTOM = 70.0, 8.0, 44.0  # left: the axis' name and a label such as 1.2·10⁻⁴
RIGHT, EDGE = 60.0, 24.0  # with and without labels behind the bars
Tick = tuple[float, str]  # position and label
Point = tuple[float, float, bool]  # importance, fluctuation, kept


@dataclass(frozen=True)
class Frame:
    """The plotting area of one chart in user units, with ticks in the same units."""

    height: float
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    right: float = RIGHT

    @property
    def total_height(self) -> float:
        return TOP + self.height + BOTTOM

    @property
    def width(self) -> float:
        return WIDTH - LEFT - self.right


@dataclass(frozen=True)
class Bars:
    """One row per layer: a pale bar for the size before, a solid one inside for the size after."""

    frame: Frame
    before: str
    after: str
    labels: list[tuple[float, float, str]]  # x, y, text; empty where rows are too thin for text


@dataclass(frozen=True)
class HeatMap:
    """One path per shade, lightest importance first, and marks over removed units."""

    frame: Frame
    shades: list[str]
    marks: str
    marks_are: str
    legend: list[Tick]


@dataclass(frozen=True)
class Scatter:
    """Dots for kept units and crosses for removed ones."""

    frame: Frame
    kept: str
    removed: str


@dataclass(frozen=True)
class Curve:
    """A line through values by step; dots where they are few, and a ring around one of them."""

    frame: Frame
    line: str
    dots: str
    ring: tuple[float, float] | None


@dataclass(frozen=True)
class HeatRows:
    """Importances to draw: per layer one value per KV head, or per bin of units sorted by importance.

    ``removed`` holds the removed heads of each layer; ``cuts`` the share of each layer's units that goes,
    where the units that go are the least important ones. One of the two is empty.
    """

    rows: list[list[float]]
    removed: list[list[int]] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)


def bars(before: Sequence[int], after: Sequence[int], x_label: str) -> Bars:
    """Sizes of every layer before and after, layer 0 on top."""
    largest = max(*before, *after, 1)
    row = _row_height(len(before))
    axis = Axis(0, largest)
    frame = Frame(
        row * len(before), x_label, "layer", [(LEFT + at * (WIDTH - LEFT - RIGHT), text) for at, text in axis.ticks(5)],
        _layer_ticks(len(before), row),
    )  # fmt: skip
    pale, solid, labels = [], [], []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        y = TOP + index * row
        pale.append(_rectangle(LEFT, y + 0.08 * row, old / largest * frame.width, 0.84 * row))
        solid.append(_rectangle(LEFT, y + 0.2 * row, new / largest * frame.width, 0.6 * row))
        if row >= 12:
            labels.append((LEFT + max(old, new) / largest * frame.width + 4, y + 0.5 * row, f"{new:,}"))
    return Bars(frame, "".join(pale), "".join(solid), labels)


def heat_map(heat: HeatRows, x_label: str) -> HeatMap:
    """Colour by importance on one scale for all layers, layer 0 on top; each shade covers as many cells."""
    row = _row_height(len(heat.rows))
    ordered = sorted(value for values in heat.rows for value in values)
    bounds = [ordered[min(len(ordered) - 1, len(ordered) * step // SHADES)] for step in range(SHADES + 1)]
    most = max(map(len, heat.rows))
    width = WIDTH - LEFT - EDGE
    if heat.cuts or not heat.removed:
        ticks = [(LEFT + share / 100 * width, f"{share} %") for share in (0, 25, 50, 75, 100)]
    else:
        ticks = [(LEFT + (head + 0.5) * width / most, str(head)) for head in whole_ticks(most, 16)]
    frame = Frame(row * len(heat.rows), x_label, "layer", ticks, _layer_ticks(len(heat.rows), row), right=EDGE)
    shades = [""] * SHADES
    for index, values in enumerate(heat.rows):
        cells = most if heat.removed else len(values)
        for column, value in enumerate(values):
            shade = bisect(bounds, value, 1, SHADES) - 1
            shades[shade] += _rectangle(LEFT + column * width / cells, TOP + index * row, width / cells, row)
    legend = [(step / SHADES, number(bounds[step])) for step in range(0, SHADES + 1, 3)]
    marks = _crosses(heat.removed, width / most, row) if heat.removed else _cuts(heat.cuts, width, row)
    kind = "crosses" if heat.removed else "line" if heat.cuts else ""
    return HeatMap(frame, shades, marks, kind, legend)


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> Scatter:
    """Importance to the right, fluctuation upwards."""
    x_axis = Axis.around(x for x, _, _ in points).padded()
    y_axis = Axis.around(y for _, y, _ in points).padded()
    height, width = 280.0, WIDTH - LEFT - EDGE
    frame = Frame(
        height, x_label + _scale_note(x_axis), y_label + _scale_note(y_axis),
        [(LEFT + place * width, text) for place, text in x_axis.ticks()],
        [(TOP + (1 - place) * height, text) for place, text in y_axis.ticks()], right=EDGE,
    )  # fmt: skip
    kept, removed = [], []
    for x, y, stays in points:
        across, down = LEFT + x_axis.place(x) * width, TOP + (1 - y_axis.place(y)) * height
        if stays:
            kept.append(f"M{_n(across)} {_n(down)}h0")  # a line of no length with round ends is a dot
        else:
            removed.append(f"M{_n(across - 2)} {_n(down - 2)}l4 4m-4 0l4-4")
    return Scatter(frame, "".join(kept), "".join(removed))


def curve(points: Sequence[tuple[float, float]], steps: int, y_label: str, ringed: float | None = None) -> Curve:
    """(step, value) from left to right over 0 to ``steps``; of many, means of neighbours. ``ringed`` is a step."""
    each = -(-len(points) // MOST_POINTS)
    drawn = [_mean(points[start : start + each]) for start in range(0, len(points), each)]
    x_axis, y_axis = Axis(0, max(steps, 1)), Axis.around(y for _, y in drawn).padded()
    height, width = 220.0, WIDTH - LEFT - EDGE
    places = [(LEFT + x_axis.place(x) * width, TOP + (1 - y_axis.place(y)) * height) for x, y in drawn]
    frame = Frame(
        height, "step", y_label + _scale_note(y_axis),
        [(LEFT + place * width, text) for place, text in x_axis.ticks() if float(x_axis.value(place)).is_integer()],
        [(TOP + (1 - place) * height, text) for place, text in y_axis.ticks()], right=EDGE,
    )  # fmt: skip
    line = "".join(f"{'L' if index else 'M'}{_n(x)} {_n(y)}" for index, (x, y) in enumerate(places))
    dots = "".join(f"M{_n(x)} {_n(y)}h0" for x, y in places) if len(places) <= MOST_DOTS else ""
    ring = next((place for place, (step, _) in zip(places, drawn, strict=True) if step == ringed), None)
    return Curve(frame, line, dots, ring)


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*points, strict=True)
    return sum(xs) / len(points), sum(ys) / len(points)


def _scale_note(axis: Axis) -> str:
    return ", logarithmic" if axis.log else ""


def _row_height(layers: int) -> float:
    """Thick rows for few layers, thin ones for many, so that 80 layers fit a printed page."""
    return min(18.0, max(3.0, 680 / layers))


def _layer_ticks(layers: int, row: float) -> list[Tick]:
    shown = whole_ticks(layers, max(1, int(layers * row / 16)))
    return [(TOP + (index + 0.5) * row, str(index)) for index in shown]


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    return f"M{_n(x)} {_n(y)}h{_n(width)}v{_n(height)}h{_n(-width)}z" if width > 0 else ""


def _crosses(removed: list[list[int]], cell: float, row: float) -> str:
    """A diagonal cross over every removed KV head."""
    half = 0.3 * min(cell, row)
    marks = []
    for index, heads in enumerate(removed):
        y = TOP + (index + 0.5) * row
        for head in heads:
            x = LEFT + (head + 0.5) * cell
            marks.append(f"M{_n(x - half)} {_n(y - half)}l{_n(2 * half)} {_n(2 * half)}m{_n(-2 * half)} 0")
            marks.append(f"l{_n(2 * half)} {_n(-2 * half)}")
    return "".join(marks)


def _cuts(cuts: list[float], width: float, row: float) -> str:
    """A stepped line between what goes (left) and what stays."""
    return "".join(
        f"{'M' if not index else 'L'}{_n(LEFT + share * width)} {_n(TOP + index * row)}v{_n(row)}"
        for index, share in enumerate(cuts)
    )


def _n(value: float) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
