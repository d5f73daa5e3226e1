"""Cells of the benchmark of recovery, and the rows made of them: every case, and what is asked."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import Row
from benchmarks.recovery_cases import ASKED, BYTES, GROUPWISE, RECOVERED, Case
from saap.recovery.settings import Settings


@dataclass(frozen=True)
class Cell:
    """One recovered model. Perplexities are of one text; ``share`` is the bytes of its Linears over 16-bit ones'."""

    model: str
    text: str
    case: str
    ratio: float
    seed: int
    perplexity: float
    pruned: float
    dense: float
    share: float
    tokens: int  # trained on, with repetitions
    seconds: float
    settings: dict[str, Any] | None

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What makes it this cell and no other."""
        return self.model, self.text, self.case, self.ratio, self.seed

    @property
    def recovered(self) -> float:
        """The share of the log-perplexity lost to pruning that came back."""
        return math.log(self.pruned / self.perplexity) / math.log(self.pruned / self.dense)


def read_cells(path: Path) -> list[Cell]:
    """What ``--cells`` wrote; ValueError for other files."""
    try:
        return [Cell(**row) for row in json.loads(path.read_text())]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a list of cells as benchmarks.recovery writes them: {error}") from error


def said(settings: Settings | None) -> dict[str, Any] | None:
    """Without the seed, which is the cell's."""
    return None if settings is None else {k: v for k, v in settings.to_dict().items() if k != "seed"}


def check_settings(kept: Sequence[Cell], cases: Sequence[Case]) -> None:
    """Raise ValueError where a case was measured with other settings."""
    named = {case.name: said(case.settings) for case in cases}
    for cell in kept:
        mine = named.get(cell.case, cell.settings)
        if mine != cell.settings:
            old, new = (set((each or {}).items()) for each in (cell.settings, mine))
            names = sorted({name for name, _ in old ^ new})
            raise ValueError(f"{cell.case}: the cells kept were measured with other {', '.join(names) or 'settings'}")


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """Every case against dense, then what is asked; geometric means over the seeds that both have."""
    rows = []
    for model, text, ratio in dict.fromkeys((cell.model, cell.text, cell.ratio) for cell in cells):
        found: dict[str, dict[int, Cell]] = {}
        for cell in cells:
            if (cell.model, cell.text, cell.ratio) == (model, text, ratio):
                found.setdefault(cell.case, {})[cell.seed] = cell
        rows += _of_one(f"{model}, {text}, {ratio:.0%} of blocks", ratio, found)
    return rows


def _of_one(head: str, ratio: float, found: dict[str, dict[int, Cell]]) -> list[Row]:
    rows = []
    for name, seeds in found.items():
        dense = next(iter(seeds.values())).dense
        rows.append(Row.compare(f"{head}: {name} / dense", _mean(seeds.values()), dense, "ppl"))
        share = mean(cell.recovered for cell in seeds.values())
        wanted = RECOVERED.get((name, ratio), "")
        rows.append(Row.single(f"{head}: {name}, of the lost log-perplexity", share, "recovered", wanted))
    for asked in ASKED:
        mine, theirs = found.get(asked.ours, {}), found.get(asked.peer, {})
        common = sorted(mine.keys() & theirs.keys())
        if common:
            pair = [_mean([each[seed] for seed in common]) for each in (mine, theirs)]
            rows.append(Row.compare(f"{head}: {asked.ours} / {asked.peer}", *pair, "ppl", asked.bound))
    if GROUPWISE in found:
        share = mean(cell.share for cell in found[GROUPWISE].values())
        rows.append(Row.single(f"{head}: {GROUPWISE}, bytes of Linears / 16-bit", share, "share", BYTES))
    return rows


def _mean(cells: Iterable[Cell]) -> float:
    return math.exp(mean(math.log(cell.perplexity) for cell in cells))
