"""What quantising costs: perplexity of the shipped models on the report text with int8 and int4 weights in groups.

Rows compare with the same model as it is, in fp32. ``saap.accelerate`` rounds to the nearest step, nothing is tuned.
"""

import copy
from collections.abc import Iterator

import saap
from benchmarks.common import Row
from benchmarks.criteria import held_out, load_model
from benchmarks.tasks import run
from saap.evaluate import perplexity

MODELS = ("small_model", "small_qwen2")
KINDS = ((8, 128), (8, 32), (4, 128), (4, 64), (4, 32))  # bits and group


def measure(quick: bool) -> Iterator[Row]:
    for name in MODELS[:1] if quick else MODELS:
        model, tokenizer = load_model(name)
        ids = held_out(tokenizer, "report", 512 if quick else 20_480)
        plain = perplexity(model, tokenizer, [ids])
        for bits, group in KINDS:
            packed = copy.deepcopy(model)
            saap.accelerate(packed, bits=bits, group_size=group, measure=False)
            found = perplexity(packed, tokenizer, [ids])
            yield Row.compare(f"{name}, report text: int{bits} in groups of {group} / fp32", found, plain, "ppl")


if __name__ == "__main__":
    run(__doc__ or "", measure)
