"""Runs llama.cpp for the cases, in the environment that has it: no torch, nothing of saap.

``python llamacpp_worker.py REQUEST OUT``: REQUEST is JSON {"model": GGUF file, "ids": [[...], ...], "texts": [...]};
OUT gets, as one .npz, "logits_0", ... (tokens, vocabulary) of each list of ids and "tokens_0", ... of each text, and
"meta" with the file's metadata as JSON. The KV cache is f32, so that nothing but the weights' type rounds.
"""

import json
import sys

import llama_cpp
import numpy as np


def main(request: str, out: str) -> None:
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    context = max([8, *map(len, asked.get("ids", []))])
    model = llama_cpp.Llama(
        asked["model"],
        n_ctx=context,
        n_batch=context,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        vocab_only=not asked.get("ids"),
    )
    found = {"meta": np.array(json.dumps(model.metadata))}
    for index, ids in enumerate(asked.get("ids", [])):
        model.reset()
        model.eval(ids)
        found[f"logits_{index}"] = np.array(model.scores[: len(ids)], dtype=np.float32)
    for index, text in enumerate(asked.get("texts", [])):
        tokens = model.tokenize(text.encode("utf-8"), add_bos=True, special=asked.get("special", False))
        found[f"tokens_{index}"] = np.array(tokens)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
