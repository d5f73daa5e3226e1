"""What a target's constraints cost: perplexity of the shipped models on the report text, pruned for it and for none.

Rows compare plans of one calibration (one seed, 128 x 256 tokens) at the same share of the decoder layers'
parameters, which each plan may pass by its last step; the case says what it removed. Compensation is off. The models
are small: 256 channels are a third of a layer there and a fortieth in a 7B model.
"""

from collections.abc import Iterator

import saap
from benchmarks.common import SMALL_MODEL, Row
from benchmarks.criteria import CALIBRATION, held_out, load_model
from benchmarks.tasks import run
from saap.evaluate import perplexity
from saap.plan import LayerPlan, Plan

MODELS = ("small_model", "small_qwen2")
RATIOS = (0.2, 0.5)  # of the decoder layers' parameters
# and devices; two GPUs would leave of a small_qwen2 more than half
TARGETS: tuple[tuple[str | None, int], ...] = (
    (None, 1), ("transformers", 1), ("vllm", 1), ("vllm", 2), ("llama.cpp", 1), ("edge", 1), ("gpu", 1),
)  # fmt: skip


def measure(quick: bool) -> Iterator[Row]:
    for name in MODELS[:1] if quick else MODELS:
        model, tokenizer = load_model(name)
        ids = held_out(tokenizer, "report", 512 if quick else 20_480)
        calibration = CALIBRATION | ({"samples": 4} if quick else {})
        scores = saap.score(saap.calibrate(model, tokenizer, SMALL_MODEL / "calibration.jsonl", **calibration))
        for ratio in RATIOS:
            plans: dict[str, Plan] = {}
            measured: dict[tuple[LayerPlan, ...], float] = {}
            for target, devices in TARGETS:
                plan = saap.search(scores, ratio, ratio_of="blocks", target=target, tensor_parallel=devices)
                plans[f"{target or 'none'}{f' on {devices} devices' if devices > 1 else ''}"] = plan
                if plan.layers not in measured:
                    pruned = saap.compact(model, plan, copy=True)
                    measured[plan.layers] = perplexity(pruned, tokenizer, [ids])
            plain = plans.pop("none")
            for target, plan in plans.items():
                removed = f"({plan.block_ratio:.1%} removed) / none ({plain.block_ratio:.1%})"
                case = f"{name}, {ratio:.0%}: for {target} {removed}"
                asked = "== 1" if target == "transformers" else ""
                yield Row.compare(case, measured[plan.layers], measured[plain.layers], "ppl", asked)


if __name__ == "__main__":
    run(__doc__ or "", measure)
