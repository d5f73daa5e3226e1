"""Write the tables and the figure of docs/evidence.md from measured cells.

``python -m benchmarks.evidence --cells FILE ... --rho FILE ... [--out docs]`` reads what ``benchmarks.criteria
--cells`` and ``benchmarks.single_units --found`` wrote and replaces what stands between the marks in ``evidence.md``;
the prose around them is a person's.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.criteria import RATIOS, Cell
from benchmarks.evidence_figure import draw
from benchmarks.results import write_whole

DEFAULT = "saap (default)"
TITLES = {
    "criteria": "Criteria: one global search, nothing compensated",
    "choices": "Choices of the method: the default with one thing changed",
    "pipelines": "Whole pipelines, and methods as published",
}
BEST = "saap, 4 steps, least squares"
PUBLISHED = ("LLM-Pruner as published: local", "FLAP as published: z-scores and bias")


def by_case(cells: Sequence[Cell]) -> dict[str, dict[float, dict[int, float]]]:
    """{case: {ratio: {seed: perplexity over dense}}} of one model."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for cell in cells:
        found.setdefault(cell.case, {}).setdefault(cell.ratio, {})[cell.seed] = cell.perplexity / cell.dense
    return found


def table(title: str, cases: dict[str, dict[float, dict[int, float]]], reference: dict[float, dict[int, float]]) -> str:
    """Mean and standard deviation over seeds at each ratio, and in how many seeds the default is at least as good."""
    lines = [f"**{title}**", "", "| | " + " | ".join(f"{r:.0%}" for r in RATIOS) + " | default at least as good |"]
    lines.append("|---" * (len(RATIOS) + 2) + "|")
    for name, ratios in sorted(
        cases.items(), key=lambda item: sum(math.log(mean(v.values())) for v in item[1].values())
    ):
        shown = [_shown(list(ratios[ratio].values())) for ratio in RATIOS]
        paired = [f"{sum(reference[r][s] <= v for s, v in ratios[r].items())}/{len(ratios[r])}" for r in RATIOS]
        lines.append(f"| {name} | {' | '.join(shown)} | {'' if ratios is reference else ', '.join(paired)} |")
    return "\n".join(lines)


def _shown(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 and mean(values) < 10 else ""
    return f"{mean(values):.3f}{spread}" if mean(values) < 10 else f"{mean(values):.1f}"


def targets(cases: dict[str, dict[float, dict[int, float]]], groups: dict[str, str]) -> str:
    """What was asked of the default pipeline at 50 %, and what was measured: increases of perplexity over dense."""
    rise = {name: mean(ratios[RATIOS[-1]].values()) - 1 for name, ratios in cases.items()}
    plain = min((name for name in rise if groups[name] == "criteria"), key=rise.__getitem__)
    lines = ["| at 50 %, increase over dense | asked | measured |", "|---|---|---|"]
    lines.append(f"| {BEST} / best uncompensated criterion ({plain}) | <= 0.65 | {rise[BEST] / rise[plain]:.3f} |")
    lines += [f"| {BEST} / {name} | <= 0.40 | {rise[BEST] / rise[name]:.3f} |" for name in PUBLISHED]
    return "\n".join(lines)


def strongest(cases: dict[str, dict[float, dict[int, float]]], groups: dict[str, str]) -> str:
    """At each ratio the criterion that does best against the default, paired over seeds: it shall not be ahead."""
    lines = [
        "| strongest other criterion, paired | asked of log(perplexity / default's) | mean ± standard error |",
        "|---|---|---|",
    ]
    for ratio in RATIOS:
        found = {
            name: paired(ratios[ratio], cases[DEFAULT][ratio])
            for name, ratios in cases.items()
            if groups[name] == "criteria" and name != DEFAULT
        }
        name = min(found, key=lambda each: found[each][0])
        mid, error = found[name]
        lines.append(f"| at {ratio:.0%}: {name} | >= 0 | {mid:+.3%} ± {error:.3%} |")
    return "\n".join(lines)


def paired(other: dict[int, float], default: dict[int, float]) -> tuple[float, float]:
    """Mean over common seeds of log(other / default), and its standard error (0 for one seed)."""
    gaps = [math.log(value / default[seed]) for seed, value in other.items() if seed in default]
    return mean(gaps), stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0


def rho_table(found: dict) -> str:
    lines = [
        f"**Spearman's rho with the true rise of the loss: every KV group, {found['channels']} channels**",
        "",
    ]
    lines += ["| | KV groups | channels | both, per parameter |", "|---|---|---|---|"]
    for name, parts in sorted(found["rho"].items(), key=lambda item: -item[1]["both"][0]):
        lines.append(
            "| "
            + " | ".join([name, *(f"{parts[p][0]:.2f} ± {parts[p][1]:.2f}" for p in ("attention", "mlp", "both"))])
            + " |"
        )
    return "\n".join(lines)


def sections(cells: Sequence[Cell], rhos: Sequence[dict]) -> str:
    parts = []
    for model, which in dict.fromkeys((cell.model, cell.text) for cell in cells):
        mine = [cell for cell in cells if (cell.model, cell.text) == (model, which)]
        cases, groups = by_case(mine), {cell.case: cell.group for cell in mine}
        seeds = len({cell.seed for cell in mine})
        parts.append(f"## {model}: {which} text, dense perplexity {mine[0].dense:.2f}, {seeds} calibration seeds")
        for group, title in TITLES.items():
            chosen = {name: ratios for name, ratios in cases.items() if groups[name] == group or name == DEFAULT}
            parts.append(table(title, chosen, cases[DEFAULT]))
            if group == "criteria":
                parts.append(strongest(cases, groups))
        if {BEST, *PUBLISHED} <= set(cases):
            parts.append(targets(cases, groups))
        parts += [rho_table(found) for found in rhos if found["model"] == model]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, nargs="+", required=True)
    parser.add_argument("--rho", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    cells = [Cell(**row) for file in args.cells for row in json.loads(file.read_text())]
    text = sections(cells, [json.loads(file.read_text()) for file in args.rho])
    page = args.out / "evidence.md"
    marked = re.sub(
        r"(<!-- tables -->\n).*(\n<!-- end -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", page.read_text(), flags=re.S
    )
    write_whole(page, marked)
    write_whole(args.out / "evidence.svg", draw(cells))


if __name__ == "__main__":
    main()
