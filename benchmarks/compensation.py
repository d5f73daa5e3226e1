"""Perplexity of the shipped model by compensation, at equal plans: criterion saap, global search, selection text.

Rows compare with the dense model; each is the mean over calibration seeds. Statistics and compensation of a
seed read the same 128 sequences of 256 tokens, disjoint from the text. Some rows have little calibration
text, where damping matters; others have plans by plain and by compensated scores. On both shipped models, by seed:
compensated scores over plain ones where these, statistics and compensation are all of the same little text. On both
too, of one seed: FLAP's bias, on the selection text and on the very sequences whose means it restores.
"""

from collections.abc import Iterator
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import SMALL_MODEL, Row
from benchmarks.criteria import held_out, load_model
from benchmarks.tasks import run
from saap.calibrate import calibrate
from saap.compact import compact
from saap.compensate import Compensation, compensation
from saap.compensated_scores import compensated_scores
from saap.criteria import score
from saap.data import load_documents, pack
from saap.evaluate import perplexity
from saap.plan import Plan
from saap.search import search
from saap.statistics import Statistics
from saap.units import module_of

CALIBRATION = SMALL_MODEL / "calibration.jsonl"
CASES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "bias": {"method": "bias", "inputs": "dense"},
    "least squares, dense inputs": {"inputs": "dense"},
    "least squares, pruned inputs": {"inputs": "pruned"},
}
CAUTIONS = (1.0, 10.0, 100.0)  # times the automatic damping with pruned inputs, which is CAUTION of the module
DAMPINGS = ("auto", 1e-3, 1e-2, 1e-1)
LITTLE = {f"{n} sequences, damping {d}": {"damping": d, "samples": n} for n in (4, 16) for d in DAMPINGS}


def measure(quick: bool) -> Iterator[Row]:
    yield from of_shipped_model(quick)
    yield from of_scores(quick)
    for name in ("small_qwen2",) if quick else ("small_model", "small_qwen2"):
        yield from of_little_text(name, quick)
        yield from of_bias(name, quick)


def of_shipped_model(quick: bool) -> list[Row]:
    model, tokenizer = load_model()
    documents = load_documents(SMALL_MODEL / "selection.jsonl")[: 1 if quick else None]
    dense, samples = perplexity(model, tokenizer, documents), 4 if quick else 128
    found: dict[str, list[float]] = {}
    for seed in (0,) if quick else (0, 1, 2):
        given = {"samples": samples, "seq_len": 256, "seed": seed}
        statistics = calibrate(model, tokenizer, CALIBRATION, **given)
        for ratio in (0.2,) if quick else (0.2, 0.35, 0.5):
            plan = search(score(statistics, "saap"), ratio, ratio_of="blocks")
            for name, options in (CASES | (LITTLE if ratio == 0.5 and seed == 0 else {})).items():
                new = None if options is None else compensation(model, plan, tokenizer, CALIBRATION, **given | options)
                pruned = compact(model, plan, new, copy=True)
                case = f"selection, {ratio:.0%} of blocks: {name}"
                found.setdefault(case, []).append(perplexity(pruned, tokenizer, documents))
            for caution in () if seed else CAUTIONS:
                with patch("saap.compensation_sweep.CAUTION", caution):
                    new = compensation(model, plan, tokenizer, CALIBRATION, **given)
                pruned = compact(model, plan, new, copy=True)
                case = f"selection, {ratio:.0%} of blocks: pruned inputs, damping x {caution:g}, first seed"
                found.setdefault(case, []).append(perplexity(pruned, tokenizer, documents))
    return [Row.compare(case, mean(values), dense, "ppl") for case, values in found.items()]


def of_scores(quick: bool) -> Iterator[Row]:
    """Least squares after a search by plain scores, and by compensated ones of much and of little text; first seed."""
    model, tokenizer = load_model()
    ids = held_out(tokenizer, "selection", 512 if quick else 20_480)
    dense, given = perplexity(model, tokenizer, [ids]), {"samples": 4 if quick else 128, "seq_len": 256, "seed": 0}
    statistics = calibrate(model, tokenizer, CALIBRATION, **given)
    for name, options in {"saap": {}, "vector": {"order": "second"}}.items():
        plain = score(statistics, name, **options)
        scores = {"plain scores": plain}
        for samples in (2,) if quick else (128, 16):
            of_text = compensated_scores(plain, model, tokenizer, CALIBRATION, **given | {"samples": samples})
            scores[f"compensated scores of {samples} sequences"] = of_text
        for ratio in (0.2,) if quick else (0.2, 0.35, 0.5):
            for case, found in scores.items():
                plan = search(found, ratio, ratio_of="blocks")
                new = compensation(model, plan, tokenizer, CALIBRATION, **given)
                after = perplexity(compact(model, plan, new, copy=True), tokenizer, [ids])
                yield Row.compare(f"selection, {ratio:.0%} of blocks: {name}, {case}", after, dense, "ppl")


def of_little_text(name: str, quick: bool) -> Iterator[Row]:
    """Compensated scores against plain ones at 50 %, where statistics and compensation are of the same little text."""
    model, tokenizer = load_model(name)
    ids = held_out(tokenizer, "selection", 512 if quick else 20_480)
    for samples in (2,) if quick else (16, 32, 64):
        for seed in (0,) if quick else (0, 1, 2):
            given = {"samples": samples, "seq_len": 256, "seed": seed}
            plain = score(calibrate(model, tokenizer, CALIBRATION, **given), "saap")
            compensated = compensated_scores(plain, model, tokenizer, CALIBRATION, **given)
            after = []
            for found in (compensated, plain):
                plan = search(found, 0.5, ratio_of="blocks")
                new = compensation(model, plan, tokenizer, CALIBRATION, **given)
                after.append(perplexity(compact(model, plan, new, copy=True), tokenizer, [ids]))
            text = f"{samples} sequences, {compensated.settings['tokens_per_input']:g} tokens per input"
            yield Row.compare(f"{name}, 50%, {text}, seed {seed}: compensated over plain", *after, "ppl")


def of_bias(name: str, quick: bool) -> Iterator[Row]:
    """FLAP's plan at 20 % with no bias, its bias, that of o or down alone, and those of other text or inputs."""
    model, tokenizer = load_model(name)
    given = {"samples": 2 if quick else 128, "seq_len": 256, "seed": 0}
    statistics = calibrate(model, tokenizer, CALIBRATION, **given)
    plan = search(score(statistics, "flap"), 0.2, ratio_of="blocks", method="standardised")
    own = pack(tokenizer, CALIBRATION, **given)[:40].flatten()
    texts = {"selection": held_out(tokenizer, "selection", 512 if quick else 20_480), "its calibration text": own}

    def bias(**options: Any) -> Compensation:
        return compensation(model, plan, tokenizer, CALIBRATION, **{**given, "method": "bias", **options})

    whole = bias()
    cases = {"no bias": None, "bias": whole, "bias, pruned inputs": bias(inputs="pruned")}
    for part in ("o", "down"):
        layers = tuple({key: new for key, new in layer.items() if key == part} for layer in whole.layers)
        cases[f"bias of {part} alone"] = Compensation(plan, layers, whole.settings)
    cases |= {f"bias of {samples} sequences": bias(samples=samples) for samples in (() if quick else (16, 512))}
    for text, ids in texts.items():
        dense = perplexity(model, tokenizer, [ids])
        for case, new in cases.items():
            found = perplexity(compact(model, plan, new, copy=True), tokenizer, [ids])
            yield Row.compare(f"{name}, FLAP at 20% of blocks, {text}: {case}", found, dense, "ppl")
    for part in ("o", "down"):
        share = max(constant_shares(statistics, plan, part))
        yield Row.single(
            f"{name}, FLAP at 20% of blocks: constant share of {part}'s lost inputs, largest", share, "share"
        )


def constant_shares(statistics: Statistics, plan: Plan, part: str) -> list[float]:
    """Of each layer that loses inputs of o or down: their mean^2 over their mean square, which is what a bias mends.

    Sums over the features, weighted by the squares of their columns.
    """
    module = module_of(part)
    found, bounds, shares = statistics.modules[module], statistics.units.feature_offsets(module), []
    square = found.input_mean.square() + found.input_m2 / statistics.tokens
    for layer, sizes, start, end in zip(plan.layers, plan.units.layers, bounds, bounds[1:], strict=False):
        lost = torch.ones(end - start, dtype=torch.bool)
        lost[layer.features(part, sizes)] = False
        weight = found.column_square[start:end][lost]
        if len(weight):
            constant = found.input_mean[start:end][lost].square()
            shares.append(float((constant * weight).sum() / (square[start:end][lost] * weight).sum()))
    return shares


if __name__ == "__main__":
    run(__doc__ or "", measure)
