"""What vLLM's engine says to each of some checkpoints, in one process: tokens, or why it refuses.

``python -m tests.serving.vllm_offline CASES.json`` with [{"model": folder, "prompts": [ids], "count": n, ...options}];
prints one JSON line per case.
"""

import gc
import json
import os
import sys
from pathlib import Path


def linears(model) -> dict[str, int]:
    """How many modules run each quantisation method."""
    methods = [type(m.quant_method).__name__ for m in model.modules() if hasattr(m, "quant_method")]
    return {name: methods.count(name) for name in set(methods)}


def answer(case: dict) -> dict:
    from vllm import LLM, SamplingParams

    prompts, count = case.pop("prompts"), case.pop("count")
    try:
        llm = LLM(dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True, **case)
    except ValueError as error:
        return {"error": str(error)}
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    found = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    if case.get("tensor_parallel_size", 1) == 1:
        found["linears"] = llm.apply_model(linears)[0]
    del llm
    gc.collect()
    return found


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    if all(case.get("tensor_parallel_size", 1) == 1 or case.get("refused") for case in cases):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs here: no process to start for each case
    for case in cases:
        case.pop("refused", None)
        print("ANSWER", json.dumps(answer(case)), flush=True)


if __name__ == "__main__":
    main()
