"""The figure of docs/evidence.md: perplexity over dense by share removed, one panel per model, log scale."""

import math
from collections.abc import Sequence
from statistics import mean

from benchmarks.criteria import RATIOS, Cell
from benchmarks.evidence_cases import BEST, DEFAULT, PUBLISHED

WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 300, 56, 34, 40
TOP_OF_SCALE = 3.0  # worse lines leave through the top
LINES = {  # colours that colour-blind readers can tell apart (Okabe and Ito), and dashes
    BEST: ("#0072B2", ""),
    DEFAULT: ("#56B4E9", ""),
    "element, first order": ("#009E73", "6 3"),
    "mask gradient, second order": ("#E69F00", "2 3"),
    PUBLISHED[0]: ("#D55E00", "8 3 2 3"),
    "Wanda-sp as published: local": ("#CC79A7", "4 4"),
}


def draw(cells: Sequence[Cell]) -> str:
    """An SVG document; only of cells that have a line."""
    cells = [cell for cell in cells if cell.case in LINES]
    models = list(dict.fromkeys((cell.model, cell.text) for cell in cells))
    total = len(models) * (WIDTH + GAP) + 20
    height = TOP + HEIGHT + 60 + 20 * math.ceil(len(LINES) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}"',
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{total}" height="{height}" fill="white"/>',
    ]
    for index, model in enumerate(models):
        parts += _panel(index * (WIDTH + GAP), [cell for cell in cells if (cell.model, cell.text) == model])
    for index, (name, (colour, dash)) in enumerate(LINES.items()):
        x, y = LEFT + index % 2 * 300, TOP + HEIGHT + 56 + index // 2 * 20
        parts.append(f'<path d="M{x} {y - 4}h34" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{x + 42}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, cells: list[Cell]) -> list[str]:
    def x(ratio: float) -> float:
        return left + LEFT + ratio / 0.55 * (WIDTH - LEFT)

    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - math.log(value) / math.log(TOP_OF_SCALE))

    parts = [f'<text x="{left + LEFT}" y="20" font-weight="bold">{cells[0].model}, {cells[0].text} text</text>']
    for value in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0):
        parts.append(f'<path d="M{x(0):.1f} {y(value):.1f}H{x(0.55):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(0) - 8:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for ratio in (0.0, *RATIOS):
        parts.append(f'<text x="{x(ratio):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{ratio:.0%}</text>')
    parts.append(
        f'<text x="{x(0.275):.1f}" y="{TOP + HEIGHT + 36}" text-anchor="middle">'
        "share of the blocks' parameters removed</text>"
    )
    middle = TOP + HEIGHT / 2
    parts.append(
        f'<text x="{left + 14}" y="{middle}" text-anchor="middle" transform="rotate(-90 {left + 14} {middle})">'
        "perplexity / dense</text>"
    )
    for name, (colour, dash) in LINES.items():
        found = {r: [c.perplexity / c.dense for c in cells if c.case == name and c.ratio == r] for r in RATIOS}
        points = [(x(0), y(1.0)), *((x(r), y(mean(values))) for r, values in found.items() if values)]
        path = "L".join(f"{px:.1f} {max(py, TOP - 8):.1f}" for px, py in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>')
    return parts
