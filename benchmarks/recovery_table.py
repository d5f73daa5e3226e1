"""Write the tables of docs/recovery.md from measured cells.

``python -m benchmarks.recovery_table --cells FILE ... [--out docs]`` reads what ``benchmarks.recovery --cells`` wrote
and replaces what stands between the marks in ``recovery.md``; the prose around them is a person's. What is not measured
is left out.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.common import Row
from benchmarks.recovery_cases import CASES, GROUPS
from benchmarks.recovery_cells import Cell, read_cells, rows_of
from benchmarks.results import write_whole

TITLES = {
    "main": "What is asked: group-wise int4 against LoRA, and LoRA quantised afterwards",
    "others": "Other ways to tune",
    "choices": "Group-wise int4 with one thing changed",
}


def sections(cells: Sequence[Cell]) -> str:
    """All tables: a section for each model and text."""
    parts = []
    for model, text in dict.fromkeys((cell.model, cell.text) for cell in cells):
        mine = [cell for cell in cells if (cell.model, cell.text) == (model, text)]
        parts.append(f"## {model}: {text} text, dense perplexity {mine[0].dense:.2f}")
        for group in GROUPS:
            names = [case.name for case in CASES if case.group == group]
            found = [cell for cell in mine if cell.case in names]
            if found:
                parts.append(f"**{TITLES[group]}**\n\n{case_table(found, names)}")
        asked = [row for row in rows_of(mine) if row.asked]
        if asked:
            parts.append(asked_table(asked, f"{model}, {text}, "))
    return "\n\n".join(parts)


def case_table(cells: Sequence[Cell], names: Sequence[str]) -> str:
    """Perplexity and the share recovered of ``names`` at each ratio, and the bytes of their Linears at the first."""
    ratios = sorted({cell.ratio for cell in cells})
    pruned = {ratio: [cell.pruned for cell in cells if cell.ratio == ratio] for ratio in ratios}
    head = ["", *(f"{ratio:.0%}: perplexity | recovered" for ratio in ratios), "bytes"]
    lines = [f"| {' | '.join(head)} |", "|---" * (2 * len(ratios) + 2) + "|"]
    lines.append(f"| pruned | {' | '.join(f'{_shown(sorted(set(pruned[ratio])))} | 0' for ratio in ratios)} | 1.000 |")
    for name in names:
        mine = [cell for cell in cells if cell.case == name]
        if not mine:
            continue
        shown = []
        for ratio in ratios:
            here = [cell for cell in mine if cell.ratio == ratio]
            shown += [_shown([cell.perplexity for cell in here]), _shown([100 * cell.recovered for cell in here], "%")]
        lines.append(f"| {name} | {' | '.join(shown)} | {mine[0].share:.3f} |")
    return "\n".join(lines)


def _shown(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return ""
    digits = 1 if unit else 2
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}{f' {unit}' if unit else ''}"


def asked_table(rows: Sequence[Row], head: str) -> str:
    """What was asked and what was measured, ``head`` cut off the names."""
    lines = ["| | asked | measured | |", "|---|---|---|---|"]
    for row in rows:
        value = row.ours if row.ratio is None else row.ratio
        verdict = "**missed**" if row.missed else "kept"
        lines.append(f"| {row.case.removeprefix(head)} | {row.asked} | {value:.3f} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    text = sections([cell for file in args.cells for cell in read_cells(file)])
    page = args.out / "recovery.md"
    marked = re.sub(
        r"(<!-- tables -->\n).*(\n<!-- end -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", page.read_text(), flags=re.S
    )
    write_whole(page, marked)


if __name__ == "__main__":
    main()
