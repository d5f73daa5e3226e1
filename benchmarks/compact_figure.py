"""Time of a product against the width that pruning left: one panel per op and token count."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from saap.axes import Axis

WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 220, 64, 34, 76
COLUMNS = 2
LINES = {  # colours that colour-blind readers can tell apart (Okabe and Ito), and dashes
    "ours": ("#0072B2", ""),
    "F.linear": ("#D55E00", "6 3"),
    "F.linear padded": ("#009E73", "2 3"),
}


@dataclass(frozen=True)
class Point:
    """Seconds that a variant took for one op, token count and width."""

    op: str
    tokens: int
    width: int
    variant: str
    seconds: float


def draw(points: Sequence[Point]) -> str:
    """An SVG document of the variants that have a line."""
    points = [point for point in points if point.variant in LINES]
    panels = list(dict.fromkeys((point.op, point.tokens) for point in points))
    across, down = min(COLUMNS, len(panels)), -(-len(panels) // COLUMNS)
    total, height = across * (LEFT + WIDTH + 20), down * (TOP + HEIGHT + GAP) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}"',
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{total}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        corner = index % COLUMNS * (LEFT + WIDTH + 20) + LEFT, index // COLUMNS * (TOP + HEIGHT + GAP) + TOP
        parts += _panel(corner, [point for point in points if (point.op, point.tokens) == panel])
    for index, (name, (colour, dash)) in enumerate(LINES.items()):
        x, y = LEFT + index * 120, height - 10
        parts.append(f'<path d="M{x} {y - 4}h30" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{x + 36}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(corner: tuple[float, float], points: list[Point]) -> list[str]:
    """Axes with ticks, and one line with dots per variant; times start at 0."""
    left, top = corner
    across = Axis(min(p.width for p in points), max(p.width for p in points) + 1)
    up = Axis(0.0, max(p.seconds for p in points) * 1e6)
    first = points[0]
    parts = [f'<text x="{left}" y="{top - 12}" font-weight="bold">{escape(first.op)}, {first.tokens} tokens, us</text>']
    for place, label in up.ticks():
        y = top + (1 - place) * HEIGHT
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for place, label in across.ticks():
        x, y = left + place * WIDTH, top + HEIGHT + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{top + HEIGHT + 36}" text-anchor="middle">intermediate width</text>')
    for name, (colour, dash) in LINES.items():
        chosen = sorted((p.width, p.seconds) for p in points if p.variant == name)
        places = [
            (left + across.place(width) * WIDTH, top + (1 - up.place(seconds * 1e6)) * HEIGHT)
            for width, seconds in chosen
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
    return parts
