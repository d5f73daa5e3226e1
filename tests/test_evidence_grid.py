"""The product of all choices: its cells, its tables, and what is level with the best."""

import pytest

from benchmarks import evidence
from benchmarks.criteria import RATIOS, Cell, measure_cells
from benchmarks.evidence_cases import CASES, GRID_COLUMNS, grid_name
from tests.test_evidence import some


def test_the_grid_is_one_table_per_ratio_over_the_seeds_that_all_cells_have() -> None:
    first, second = (grid_name(name, "uniform", "bias", 4) for name in ("saap", "FLAP"))
    text = evidence.sections(some({first: (12.0, 16.0), second: (11.0,)}, "grid"), [])
    head = "|  | none | bias | least squares | none, 4 steps | bias, 4 steps | least squares, 4 steps |"
    assert text.count("%, 1 calibration seed**") == len(RATIOS) == text.count(head)
    assert "| saap, uniform |  |  |  |  | 1.200 |  |" in text and "| FLAP, uniform |  |  |  |  | **1.100** |  |" in text
    assert "default" not in text  # nothing is compared with it
    assert "saap, global" not in text  # not measured yet
    apart = [*some({first: (12.0,)}, "grid"), Cell("m", "report", second, "grid", 0.2, 7, 11.0, 10.0)]
    with pytest.raises(ValueError, match="expected a calibration seed that all cells of the grid at 20% have"):
        evidence.sections(apart, [])


def test_cells_of_the_grid_are_level_with_the_least_by_their_differences_of_each_seed() -> None:
    names = [grid_name("saap", search, "none", 1) for search in ("global", "standardised", "uniform")]
    # as far above the least on average, once always by as much and once by chance
    found = dict(zip(names, [(11.0, 13.0), (11.2, 13.2), (11.8, 12.6)], strict=True))
    lines = evidence.sections(some(found, "grid"), []).splitlines()
    assert "| saap, global | **1.200 ± 0.141** |  |  |  |  |  |" in lines
    assert "| saap, standardised | 1.220 ± 0.141 |  |  |  |  |  |" in lines
    assert "| saap, uniform | 1.220 ± 0.057 ≈ |  |  |  |  |  |" in lines


def test_the_criteria_of_the_grid_are_compared_under_each_search_without_compensation() -> None:
    names = {
        (name, search): grid_name(name, search, "none", 1)
        for name in ("saap", "FLAP")
        for search in ("global", "uniform")
    }
    found = {
        names["saap", "global"]: (11.0, 12.0),
        names["FLAP", "global"]: (12.0, 12.6),
        names["saap", "uniform"]: (11.0,),
    }
    text = evidence.sections(some({**found, grid_name("FLAP", "uniform", "bias", 1): (9.0,)}, "grid"), [])
    # log(12 / 11) = 8.70 %, log(12.6 / 12) = 4.88 %: half of their difference is the standard error of two
    assert "| global at 20% |  |  | +6.8% ± 1.9%, ahead |" in text and "| uniform at 20%" not in text
    assert "saap's score" not in evidence.sections(some({names["saap", "uniform"]: (11.0,)}, "grid"), [])


def test_the_grid_is_the_whole_product_and_whole_columns_come_first() -> None:
    grid = [case for case in CASES if case.group == "grid"]
    assert len(grid) == 72 == len({case.name for case in grid})
    product = {(case.search["method"], case.compensate, case.steps) for case in grid}
    assert len(product) == 18 and [(case.compensate, case.steps) for case in grid[::12]] == list(GRID_COLUMNS)
    assert grid[0].steps == 1 and grid[-1].steps == 4


def test_cases_of_the_grid_prune() -> None:
    cases = [case for case in CASES if case.group == "grid" and case.steps == 1 and case.compensate != "bias"][::5]
    found = list(measure_cells("small_qwen2", "selection", [0], cases, [0.5], {"samples": 2, "seq_len": 64}, 512))
    assert [cell.case for cell in found] == [case.name for case in cases] and {cell.group for cell in found} == {"grid"}
    assert all(cell.perplexity > cell.dense for cell in found)
