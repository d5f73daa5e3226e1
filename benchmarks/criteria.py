"""Perplexity of the shipped model after pruning by each criterion, at equal search and ratio.

Scores are chosen on the selection text; ``python -m benchmarks.criteria --text report`` is for the final
table. Rows compare the perplexity with the dense model's; calibration text is disjoint from both.
"""

import sys
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common import SMALL_MODEL, Row
from benchmarks.tasks import run
from saap.calibrate import calibrate
from saap.compact import compact
from saap.criteria import Scores, score
from saap.data import load_documents
from saap.evaluate import perplexity
from saap.search import search
from saap.statistics import Statistics

CASES: dict[str, Callable[[Statistics], Scores]] = {
    "saap": lambda s: score(s, "saap"),
    "saap, first-order vector": lambda s: score(s, "saap", vector_order="first"),
    "saap, joint": lambda s: score(s, "saap", aggregation="joint"),
    "saap, last": lambda s: score(s, "saap", aggregation="last"),
    "saap, mean fusion": lambda s: score(s, "saap", fusion="mean"),
    "vector, first order": lambda s: score(s, "vector", order="first"),
    "vector, second order": lambda s: score(s, "vector", order="second"),
    "vector, second order, joint": lambda s: score(s, "vector", order="second", aggregation="joint"),
    "element, first order": lambda s: score(s, "element", order="first"),
    "element, second order": lambda s: score(s, "element", order="second"),
    "mask gradient (Fisher)": lambda s: score(s, "mask_gradient"),
    "mask gradient (first order)": lambda s: score(s, "mask_gradient", order="first"),
    "magnitude": lambda s: score(s, "magnitude"),
    "random": lambda s: score(s, "random"),
}


def load_small_model() -> tuple[PreTrainedModel, object]:
    return AutoModelForCausalLM.from_pretrained(SMALL_MODEL), AutoTokenizer.from_pretrained(SMALL_MODEL)


def measure(quick: bool, text: str = "selection") -> list[Row]:
    model, tokenizer = load_small_model()
    statistics = calibrate(
        model, tokenizer, SMALL_MODEL / "calibration.jsonl", samples=16 if quick else 128, seq_len=256, seed=0
    )
    documents = load_documents(SMALL_MODEL / f"{text}.jsonl")[: 1 if quick else None]
    dense = perplexity(model, tokenizer, documents)
    rows = []
    for method in ("global", "uniform"):
        for ratio in (0.2,) if quick else (0.2, 0.4):
            for name, criterion in CASES.items():
                plan = search(criterion(statistics), ratio, method=method, ratio_of="blocks")
                with torch.no_grad():
                    pruned = perplexity(compact(model, plan, copy=True), tokenizer, documents)
                rows.append(Row.compare(f"{text}, {method}, {ratio:.0%} of blocks: {name}", pruned, dense, "ppl"))
    return rows


if __name__ == "__main__":
    chosen = "selection"
    if "--text" in sys.argv:
        index = sys.argv.index("--text")
        chosen = sys.argv[index + 1]
        del sys.argv[index : index + 2]
    run(__doc__ or "", lambda quick: measure(quick, chosen))
