"""What the evidence compares: criteria at one search, searches, compensation and steps, and methods as published."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from saap.criteria import score
from saap.scores import Scores
from saap.statistics import Statistics

LLM_PRUNER = partial(score, criterion="element", coupled=True)  # |mean_n s| summed over the unit


@dataclass(frozen=True)
class Case:
    """One way to prune; ``group`` says which table it belongs to."""

    name: str
    group: str
    criterion: Callable[[Statistics], Scores]
    search: dict[str, Any] = field(default_factory=dict)
    compensate: str = "none"
    steps: int = 1
    inputs: str = "auto"
    step_samples: int | None = None


def _criteria() -> list[Case]:
    named: dict[str, Callable[[Statistics], Scores]] = {
        "saap (default)": partial(score, criterion="saap"),
        "element, first order": partial(score, criterion="element"),
        "element, second order": partial(score, criterion="element", order="second"),
        "vector, first order": partial(score, criterion="vector"),
        "vector, second order": partial(score, criterion="vector", order="second"),
        "mask gradient, second order": partial(score, criterion="mask_gradient"),
        "mask gradient, first order": partial(score, criterion="mask_gradient", order="first"),
        "LLM-Pruner element, first order": LLM_PRUNER,
        "LLM-Pruner element, mixed": partial(score, criterion="element", coupled=True, order="mixed"),
        "LLM-Pruner vector": partial(score, criterion="vector", coupled=True),
        "FLAP": partial(score, criterion="flap"),
        "Wanda-sp": partial(score, criterion="wanda_sp"),
        "activation (Minitron)": partial(score, criterion="activation"),
        "block influence (ShortGPT)": partial(score, criterion="block_influence"),
        "magnitude": partial(score, criterion="magnitude"),
        "random": partial(score, criterion="random"),
    }
    return [Case(name, "criteria", criterion) for name, criterion in named.items()]


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
        "search fluctuation, weight 0": {"method": "fluctuation", "fluctuation_weight": 0.0},
        "search fluctuation, weight 0.5": {"method": "fluctuation", "fluctuation_weight": 0.5},
        "search fluctuation, weight -0.5": {"method": "fluctuation", "fluctuation_weight": -0.5},
        "whole modules may go": {"allow_empty": True},
    }
    saap = partial(score, criterion="saap")
    return cases + [Case(name, "choices", saap, chosen) for name, chosen in searches.items()]


def _pipelines() -> list[Case]:
    saap, flap = partial(score, criterion="saap"), partial(score, criterion="flap")
    wanda, magnitude = (partial(score, criterion=name) for name in ("wanda_sp", "magnitude"))
    local = {"method": "uniform"}
    return [
        Case("LLM-Pruner as published: local", "pipelines", LLM_PRUNER, local),
        Case("FLAP as published: z-scores and bias", "pipelines", flap, {"method": "standardised"}, "bias"),
        Case("FLAP without its bias", "pipelines", flap, {"method": "standardised"}),
        Case("Wanda-sp as published: local", "pipelines", wanda, local),
        Case("magnitude, local", "pipelines", magnitude, local),
        Case("saap, bias", "pipelines", saap, {}, "bias"),
        Case("saap, least squares", "pipelines", saap, {}, "least_squares"),
        Case("saap, least squares, dense inputs", "pipelines", saap, {}, "least_squares", 1, "dense"),
        Case("saap, 4 steps", "pipelines", saap, {}, "none", 4),
        Case("saap, 4 steps, least squares", "pipelines", saap, {}, "least_squares", 4),
        Case("saap, 4 steps, least squares, dense inputs", "pipelines", saap, {}, "least_squares", 4, "dense"),
        Case("saap, 4 steps of 32 new sequences, least squares", "pipelines", saap, {}, "least_squares", 4, "auto", 32),
        Case(
            "mask gradient, least squares", "pipelines", partial(score, criterion="mask_gradient"), {}, "least_squares"
        ),
    ]


CASES = tuple(_criteria() + _choices() + _pipelines())
