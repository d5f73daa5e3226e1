"""Perplexity of the shipped model by compensation, at equal plans: criterion saap, global search, selection text.

Rows compare with the dense model; each is the mean over calibration seeds. Statistics and compensation of a
seed read the same 128 sequences of 256 tokens, disjoint from the text. The last rows have little calibration
text, where damping matters.
"""

from statistics import mean
from typing import Any
from unittest.mock import patch

from benchmarks.common import SMALL_MODEL, Row
from benchmarks.criteria import load_model
from benchmarks.tasks import run
from saap.calibrate import calibrate
from saap.compact import compact
from saap.compensate import compensation
from saap.criteria import score
from saap.data import load_documents
from saap.evaluate import perplexity
from saap.search import search

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


def measure(quick: bool) -> list[Row]:
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


if __name__ == "__main__":
    run(__doc__ or "", measure)
