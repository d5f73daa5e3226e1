"""What rounding costs a pruned model: perplexity of the shipped one on the selection text by bits, group and rounding.

Pruned by 20 and 50 % of the blocks with saap's defaults, calibration and least squares on 128 sequences of 256 tokens,
which gptq reads too; rows compare with the same pruned model in 16 bits. Rows of bytes are those of the decoder layers'
Linears as checkpoints store them, against bf16.
"""

import copy
from collections.abc import Iterator

import saap
from benchmarks.common import SMALL_MODEL, Row
from benchmarks.criteria import CALIBRATION, held_out, load_model
from benchmarks.recovery import linear_bytes
from benchmarks.tasks import run
from saap.data import pack
from saap.evaluate import perplexity
from saap.quantise import ROUNDINGS
from saap.quantiser import GROUPS

RATIOS = (0.2, 0.5)  # of the decoder layers' parameters
LIMIT = "<= 0.32"  # of the bytes in 16 bits, int4 in groups of 32


def measure(quick: bool) -> Iterator[Row]:
    model, tokenizer = load_model()
    ids = held_out(tokenizer, "selection", 512 if quick else 20_480)
    given = CALIBRATION | ({"samples": 4} if quick else {})
    text = pack(tokenizer, SMALL_MODEL / "calibration.jsonl", **given)
    scores = saap.score(saap.calibrate(model, tokenizer, text, **given))
    for ratio in RATIOS[1:] if quick else RATIOS:
        plan = saap.search(scores, ratio, ratio_of="blocks")
        pruned = saap.compact(model, plan, saap.compensation(model, plan, tokenizer, text, **given), copy=True)
        plain = perplexity(pruned.bfloat16(), tokenizer, [ids])
        yield Row.single(f"selection text, {ratio:.0%} of blocks removed: bf16", plain, "ppl")
        for bits in (8, 4):
            for group in GROUPS[:1] if quick else GROUPS:
                kind = f"{ratio:.0%} of blocks removed: int{bits} in groups of {group}"
                for rounding in ROUNDINGS:
                    made = copy.deepcopy(pruned)
                    data = text if rounding == "gptq" else None
                    saap.quantise(made, bits=bits, group_size=group, rounding=rounding, data=data)
                    found = perplexity(made, tokenizer, [ids])
                    yield Row.compare(f"selection text, {kind}, {rounding} / bf16", found, plain, "ppl")
                asked = LIMIT if (bits, group) == (4, 32) else ""
                yield Row.compare(f"{kind} / bf16", linear_bytes(made) / 1e6, linear_bytes(pruned) / 1e6, "MB", asked)


if __name__ == "__main__":
    run(__doc__ or "", measure)
