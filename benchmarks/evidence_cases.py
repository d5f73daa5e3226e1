"""What the evidence compares: criteria at one search, the method's choices, whole pipelines, and their full product."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from saap.criteria import score
from saap.scores import Scores
from saap.statistics import Statistics

Criterion = Callable[[Statistics], Scores]

DEFAULT = "saap (default)"  # what every table compares with
BEST = "saap, 4 steps, least squares"  # the pipeline that the targets are asked of
PLAIN = "plain scores"  # as a criterion gives them, also where least squares follows
PUBLISHED = ("LLM-Pruner as published: local", "FLAP as published: z-scores and bias")
COSTS = {  # what a criterion alone would have to measure, rising: only equal ones are a fair comparison
    "none": "no data",
    "forward": "activations of a forward pass",
    "backward": "a backward pass too, but no gradient of a weight",
    "weights": "the gradient of every weight, of each sequence",
}
LLM_PRUNER = partial(score, criterion="element", coupled=True)  # |mean_n s| summed over the unit


@dataclass(frozen=True)
class Case:
    """One way to prune; ``group`` says which table it belongs to, ``cost`` a criterion's, a key of ``COSTS``."""

    name: str
    group: str
    criterion: Criterion
    search: dict[str, Any] = field(default_factory=dict)
    compensate: str = "none"
    steps: int = 1
    inputs: str = "auto"
    step_samples: int | None = None
    cost: str = ""
    compensated_scores: bool | str = "auto"


def _criteria() -> list[Case]:
    """Every criterion under one search, by cost.

    Sums of salience over a row (dY * Y over tokens) or column (X * dX) need no gradient of a weight: neither do
    vector-wise and mask scores, LLM-Pruner's included. Sums of |s| or s^2 do.
    """
    named: dict[str, tuple[str, Criterion]] = {
        DEFAULT: ("weights", partial(score, criterion="saap")),
        "element, first order": ("weights", partial(score, criterion="element")),
        "element, second order": ("weights", partial(score, criterion="element", order="second")),
        "vector, first order": ("backward", partial(score, criterion="vector")),
        "vector, second order": ("backward", partial(score, criterion="vector", order="second")),
        "mask gradient, second order": ("backward", partial(score, criterion="mask_gradient")),
        "mask gradient, first order": ("backward", partial(score, criterion="mask_gradient", order="first")),
        "LLM-Pruner element, first order": ("weights", LLM_PRUNER),
        "LLM-Pruner element, second order": ("weights", partial(LLM_PRUNER, order="second")),
        "LLM-Pruner element, mixed": ("weights", partial(LLM_PRUNER, order="mixed")),
        "LLM-Pruner vector": ("backward", partial(score, criterion="vector", coupled=True)),
        "FLAP": ("forward", partial(score, criterion="flap")),
        "Wanda-sp": ("forward", partial(score, criterion="wanda_sp")),
        "activation (Minitron)": ("forward", partial(score, criterion="activation")),
        "block influence (ShortGPT)": ("forward", partial(score, criterion="block_influence")),
        "magnitude": ("none", partial(score, criterion="magnitude")),
        "magnitude, L1": ("none", partial(score, criterion="magnitude", norm="l1")),
        "random": ("none", partial(score, criterion="random")),
    }
    return [Case(name, "criteria", criterion, cost=cost) for name, (cost, criterion) in named.items()]


def _choices() -> list[Case]:
    """The open choices of the method: orders, aggregation, fusion and search of SAAP's score."""
    options: dict[str, dict[str, Any]] = {
        "aggregation sum": {"aggregation": "sum"},
        "aggregation joint": {"aggregation": "joint"},
        "aggregation max": {"aggregation": "max"},
        "first-order vector": {"vector_order": "first"},
        "first-order element": {"element_order": "first"},
        "first order of both": {"vector_order": "first", "element_order": "first"},
        "fusion mean": {"fusion": "mean"},
    }
    cases = [Case(name, "choices", partial(score, criterion="saap", **chosen)) for name, chosen in options.items()]
    searches: dict[str, dict[str, Any]] = {
        "search uniform": {"method": "uniform"},
        "search standardised": {"method": "standardised"},
        "whole modules may go": {"allow_empty": True},
    }
    for weight in (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0):
        searches[f"search fluctuation, weight {weight:g}"] = {"method": "fluctuation", "fluctuation_weight": weight}
    saap = partial(score, criterion="saap")
    return cases + [Case(name, "choices", saap, chosen) for name, chosen in searches.items()]


def _power(criterion: Criterion, exponent: float) -> Criterion:
    """``criterion`` with every score raised to a power: no other ranking, but another spread."""

    def powered(statistics: Statistics) -> Scores:
        found = criterion(statistics)
        return Scores.of(found.units, [found.attention**exponent, found.mlp**exponent], found.settings)

    return powered


def _z_scores() -> list[Case]:
    """What a ranking by z-scores makes of importances of the first and of the second power of salience."""
    saap, mask, element = (partial(score, criterion=name) for name in ("saap", "mask_gradient", "element"))
    named = {
        "saap": saap,
        "saap, square root": _power(saap, 0.5),
        "mask gradient, second order": mask,
        "mask gradient, second order, square root": _power(mask, 0.5),
        "element, first order": element,
        "element, first order, squared": _power(element, 2),
    }
    return [Case(f"z-scores of {name}", "z_scores", found, {"method": "standardised"}) for name, found in named.items()]


GRID_CRITERIA: dict[str, Criterion] = {
    "saap": partial(score, criterion="saap"),
    "mask gradient, second order": partial(score, criterion="mask_gradient"),
    "element, first order": partial(score, criterion="element"),
    "FLAP": partial(score, criterion="flap"),
}


def _pipelines() -> list[Case]:
    saap, flap = partial(score, criterion="saap"), partial(score, criterion="flap")
    wanda, magnitude = (partial(score, criterion=name) for name in ("wanda_sp", "magnitude"))
    local = {"method": "uniform"}
    return [
        Case(PUBLISHED[0], "pipelines", LLM_PRUNER, local),
        Case(PUBLISHED[1], "pipelines", flap, {"method": "standardised"}, "bias"),
        Case("FLAP without its bias", "pipelines", flap, {"method": "standardised"}),
        Case("Wanda-sp as published: local", "pipelines", wanda, local),
        Case("magnitude, local", "pipelines", magnitude, local),
        Case("saap, bias", "pipelines", saap, {}, "bias"),
        Case("saap, 4 steps", "pipelines", saap, {}, "none", 4),
        *(
            Case(name, "pipelines", saap, {}, "least_squares", steps, "auto", samples, compensated_scores=True)
            for name, steps, samples in (
                ("saap, least squares", 1, None),
                (BEST, 4, None),
                ("saap, 4 steps of 32 new sequences, least squares", 4, 32),
            )
        ),
        *(
            Case(f"{name}, {PLAIN}", "pipelines", saap, {}, "least_squares", steps, inputs, compensated_scores=False)
            for name, steps, inputs in (
                ("saap, least squares", 1, "auto"),
                ("saap, least squares, dense inputs", 1, "dense"),
                (BEST, 4, "auto"),
            )
        ),
        *(
            Case(
                f"{name}, least squares, {how}", "pipelines", criterion, {}, "least_squares", compensated_scores=scores
            )
            for name, criterion in GRID_CRITERIA.items()
            if name not in ("saap", "FLAP")
            for how, scores in ((PLAIN, False), ("compensated scores", True))
        ),
    ]


GRID_SEARCHES = ("global", "standardised", "uniform")
GRID_COLUMNS = tuple((compensate, steps) for steps in (1, 4) for compensate in ("none", "bias", "least_squares"))


def grid_name(criterion: str, search: str, compensate: str, steps: int) -> str:
    """Name of one cell of the product."""
    return f"grid: {criterion}; {search}; {compensate}; steps {steps}"


def _grid() -> list[Case]:
    """The product, column by column of its table and the cheap ones first: an interrupted run leaves whole columns."""
    return [
        Case(
            grid_name(name, search, *column),
            "grid",
            criterion,
            {"method": search},
            *column,
            compensated_scores=name == "saap" and column[0] == "least_squares",
        )
        for column in GRID_COLUMNS
        for search in GRID_SEARCHES
        for name, criterion in GRID_CRITERIA.items()
    ]


CASES = tuple(_criteria() + _choices() + _pipelines() + _z_scores() + _grid())
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
