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

from benchmarks.criteria import RATIOS, Cell, read_cells
from benchmarks.evidence_cases import (
    BEST,
    CASES,
    COSTS,
    DEFAULT,
    GRID_COLUMNS,
    GRID_CRITERIA,
    GRID_SEARCHES,
    PUBLISHED,
    grid_name,
)
from benchmarks.evidence_figure import draw
from benchmarks.results import write_whole

Found = dict[str, dict[float, dict[int, float]]]  # {case: {ratio: {seed: perplexity over dense}}}

COST = {case.name: case.cost for case in CASES if case.group == "criteria"}
COMPENSATIONS = {"none": "none", "bias": "bias", "least_squares": "least squares"}
TITLES = {
    "criteria": "Criteria: one global search, nothing compensated",
    "choices": "Choices of the method: the default with one thing changed",
    "pipelines": "Whole pipelines, and methods as published",
    "z_scores": "Rankings by z-scores within layers: importances and their powers",
}


def by_case(cells: Sequence[Cell]) -> Found:
    """Cells of one model and text, by case, ratio and seed."""
    found: Found = {}
    for cell in cells:
        found.setdefault(cell.case, {}).setdefault(cell.ratio, {})[cell.seed] = cell.perplexity / cell.dense
    return found


def table(title: str, cases: Found, costs: dict[str, str] | None = None) -> str:
    """Mean and standard deviation over seeds at each ratio, and in how many seeds the default is at least as good.

    Best first, by the mean over ratios; ``costs`` adds a column. What is not measured yet stays empty.
    """
    head = ["", *([] if costs is None else ["cost"]), *(f"{ratio:.0%}" for ratio in RATIOS), "default at least as good"]
    lines = [f"**{title}**", "", _row(head), "|---" * len(head) + "|"]
    for name, ratios in sorted(cases.items(), key=lambda item: _height(item[1])):
        shown = [] if costs is None else [costs[name]]
        shown += [_shown(list(ratios.get(ratio, {}).values())) for ratio in RATIOS]
        wins = [_wins(ratios.get(ratio, {}), cases[DEFAULT].get(ratio, {})) for ratio in RATIOS]
        lines.append(_row([name, *shown, "" if name == DEFAULT else ", ".join(wins)]))
    if costs is not None:
        lines += ["", f"Cost: {'; '.join(f'*{name}*, {text}' for name, text in COSTS.items())}."]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _height(ratios: dict[float, dict[int, float]]) -> float:
    return mean(math.log(mean(seeds.values())) for seeds in ratios.values())


def _wins(other: dict[int, float], default: dict[int, float]) -> str:
    common = [seed for seed in other if seed in default]
    return f"{sum(default[seed] <= other[seed] for seed in common)}/{len(common)}"


def _shown(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 and mean(values) < 10 else ""
    return f"{mean(values):.3f}{spread}" if mean(values) < 10 else f"{mean(values):.1f}"


def targets(cases: Found, groups: dict[str, str]) -> str:
    """What was asked of the pipeline at 50 %, and what was measured: increases of perplexity over dense.

    Means over the seeds that it and the default have; "" without any.
    """
    ratio = RATIOS[-1]
    seeds = cases.get(BEST, {}).get(ratio, {}).keys() & cases[DEFAULT].get(ratio, {}).keys()
    if not seeds:
        return ""
    rise = {
        name: mean(found[ratio][seed] for seed in seeds) - 1
        for name, found in cases.items()
        if seeds <= found.get(ratio, {}).keys()
    }
    plain = min((name for name in rise if groups[name] == "criteria"), key=rise.__getitem__)
    lines = ["| at 50 %, increase over dense | asked | measured |", "|---|---|---|"]
    lines.append(f"| {BEST} / best uncompensated criterion ({plain}) | <= 0.65 | {rise[BEST] / rise[plain]:.3f} |")
    lines += [f"| {BEST} / {name} | <= 0.40 | {rise[BEST] / rise[name]:.3f} |" for name in PUBLISHED if name in rise]
    return "\n".join(lines)


def strongest(cases: Found, groups: dict[str, str]) -> str:
    """At each ratio the criterion that does best against the default, paired over seeds: of equal, then of any cost.

    The default is asked to be at least as good as those that cost the same.
    """
    head = ["strongest other criterion, paired", "cost", "asked", "log(perplexity / default's), mean ± standard error"]
    lines = [_row([*head, "the default is"]), "|---" * (len(head) + 1) + "|"]
    others = [name for name in cases if groups[name] == "criteria" and name != DEFAULT]
    equal = [name for name in others if COST[name] == COST[DEFAULT]]
    for kind, asked, names in (("equal", ">= 0", equal), ("any", "", others)):
        for ratio in RATIOS:
            default = cases[DEFAULT].get(ratio, {})
            found = {name: paired(cases[name].get(ratio, {}), default) for name in names}
            known = {name: gap for name, gap in found.items() if gap is not None}
            if known:
                name = min(known, key=lambda each: known[each][0])
                mid, error = known[name]
                said = "" if error is None else f" ± {error:.3%}"
                cells = [f"of {kind} cost, at {ratio:.0%}: {name}", _against_default(COST[name]), asked]
                lines.append(_row([*cells, f"{mid:+.3%}{said}", verdict(mid, error)]))
    return "\n".join(lines)


def _against_default(cost: str) -> str:
    """The cost, and which side of the default's it is on."""
    order = list(COSTS)
    gap = order.index(cost) - order.index(COST[DEFAULT])
    return f"{cost}, {'cheaper' if gap < 0 else 'dearer'}" if gap else cost


def paired(other: dict[int, float], default: dict[int, float]) -> tuple[float, float | None] | None:
    """Mean over common seeds of log(other / default), and its standard error (None for one seed); None without any."""
    gaps = [math.log(value / default[seed]) for seed, value in other.items() if seed in default]
    if not gaps:
        return None
    return mean(gaps), stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None


def verdict(gap: float, error: float | None) -> str:
    """Where the default stands when others' log perplexities lie ``gap`` above its own."""
    if error is None:
        return "of one seed"
    if abs(gap) <= 2 * error:
        return "level"
    return "ahead" if gap > 0 else "behind"


def grid_table(cases: Found, ratio: float) -> str:
    """The product at one ratio, by compensation and steps: means and deviations over the seeds that all have.

    The least mean is bold; ≈ marks those that are level with it by their paired differences.
    """
    there = {name: ratios[ratio] for name, ratios in cases.items() if ratio in ratios}
    common = sorted(set.intersection(*(set(found) for found in there.values())))
    if not common:
        raise ValueError(f"expected a calibration seed that all cells of the grid at {ratio:.0%} have, found none")
    there = {name: {seed: found[seed] for seed in common} for name, found in there.items()}
    least = min(there, key=lambda name: mean(there[name].values()))
    columns = [f"{COMPENSATIONS[each]}{f', {steps} steps' if steps > 1 else ''}" for each, steps in GRID_COLUMNS]
    title = f"**Criteria x searches x compensation x steps at {ratio:.0%}, {len(common)} calibration seed"
    lines = [f"{title}{'s' if len(common) > 1 else ''}**", "", _row(["", *columns]), "|---" * (len(columns) + 1) + "|"]
    for criterion in GRID_CRITERIA:
        for search in GRID_SEARCHES:
            row = [grid_name(criterion, search, *column) for column in GRID_COLUMNS]
            if any(name in there for name in row):
                shown = [_against_least(there[name], there[least]) if name in there else "" for name in row]
                lines.append(_row([f"{criterion}, {search}", *shown]))
    return "\n".join(lines)


def _against_least(found: dict[int, float], least: dict[int, float]) -> str:
    shown = _shown(list(found.values()))
    if found is least:
        return f"**{shown}**"
    gap = paired(found, least)
    return f"{shown} ≈" if gap and verdict(*gap) == "level" else shown


def searches_table(cases: Found) -> str:
    """The grid's criteria against SAAP's under each search, nothing compensated, in one step; paired over seeds."""
    lines = ["**The same criteria under each search, nothing compensated: log(perplexity / saap's)**", ""]
    own, *others = GRID_CRITERIA
    lines += [_row(["mean ± standard error, and where saap's score is", *others]), "|---" * (len(others) + 1) + "|"]
    for ratio in sorted({ratio for found in cases.values() for ratio in found}):
        for search in GRID_SEARCHES:
            saap = cases.get(grid_name(own, search, "none", 1), {}).get(ratio, {})
            found = [cases.get(grid_name(each, search, "none", 1), {}).get(ratio, {}) for each in others]
            gaps = [paired(each, saap) for each in found]
            if any(gaps):
                lines.append(_row([f"{search} at {ratio:.0%}", *map(_gap, gaps)]))
    return "\n".join(lines) if len(lines) > 4 else ""  # without a row: nothing to compare


def _gap(gap: tuple[float, float | None] | None) -> str:
    if gap is None:  # not measured yet
        return ""
    error = "" if gap[1] is None else f" ± {gap[1]:.1%}"
    return f"{gap[0]:+.1%}{error}, {verdict(*gap)}"


def rho_table(found: dict) -> str:
    title = (
        f"Spearman's rho with the true rise of the loss: every KV group, {found['channels']} channels; 95 % intervals"
    )
    lines = [f"**{title}**", "", "| | KV groups | channels | both, per parameter |", "|---|---|---|---|"]
    for name, parts in sorted(found["rho"].items(), key=lambda item: -item[1]["both"][0]):
        shown = ["{:.2f} [{:.2f}, {:.2f}]".format(*parts[part]) for part in ("attention", "mlp", "both")]
        lines.append(_row([name, *shown]))
    return "\n".join(lines)


def sections(cells: Sequence[Cell], rhos: Sequence[dict]) -> str:
    parts = []
    for model, which in dict.fromkeys((cell.model, cell.text) for cell in cells):
        mine = [cell for cell in cells if (cell.model, cell.text) == (model, which)]
        seeds = len({cell.seed for cell in mine})
        parts.append(f"## {model}: {which} text, dense perplexity {mine[0].dense:.2f}, {seeds} calibration seeds")
        parts += compared([cell for cell in mine if cell.group in TITLES])
        grid = by_case([cell for cell in mine if cell.group == "grid"])
        parts += [grid_table(grid, ratio) for ratio in sorted({ratio for found in grid.values() for ratio in found})]
        if by_search := searches_table(grid):
            parts.append(by_search)
        parts += [rho_table(found) for found in rhos if found["model"] == model]
    return "\n\n".join(parts)


def compared(cells: Sequence[Cell]) -> list[str]:
    """Tables of one model and text that compare with the default; ValueError for cells without it."""
    cases, groups, parts = by_case(cells), {cell.case: cell.group for cell in cells}, []
    if cells and DEFAULT not in cases:
        raise ValueError(f"expected cells of {DEFAULT!r} on the {cells[0].text} text of {cells[0].model}, got none")
    unknown = [name for name in cases if groups[name] == "criteria" and name not in COST]
    if unknown:
        raise ValueError(f"cells of unknown criteria {', '.join(unknown)}: expected some of {', '.join(COST)}")
    for group, title in TITLES.items():
        chosen = {name: ratios for name, ratios in cases.items() if groups[name] == group or name == DEFAULT}
        if group in groups.values():
            parts.append(table(title, chosen, COST if group == "criteria" else None))
        if group == "criteria" and len(chosen) > 1:
            parts.append(strongest(cases, groups))
    asked = targets(cases, groups) if cases else ""
    return [*parts, asked] if asked else parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, nargs="+", required=True)
    parser.add_argument("--rho", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    cells = [cell for file in args.cells for cell in read_cells(file)]
    text = sections(cells, [json.loads(file.read_text()) for file in args.rho])
    page = args.out / "evidence.md"
    marked = re.sub(
        r"(<!-- tables -->\n).*(\n<!-- end -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", page.read_text(), flags=re.S
    )
    write_whole(page, marked)
    write_whole(args.out / "evidence.svg", draw(cells))


if __name__ == "__main__":
    main()
