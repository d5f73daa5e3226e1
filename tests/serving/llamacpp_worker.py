"""Runs llama.cpp for the cases, in the environment that has it: no torch, nothing of saap.

``python llamacpp_worker.py REQUEST OUT``: REQUEST is JSON {"model": GGUF file, "ids": [[...], ...], "greedy": how many
tokens follow each, "texts": [...], "special": whether texts may hold special tokens}. OUT gets, as one .npz, for each
list of ids "ids_0" with the greedy tokens at its end and "logits_0" (tokens, vocabulary) at every one of them, for each
text "tokens_0", and "meta", the file's metadata as JSON. The KV cache is f32: nothing but the weights' type rounds.
"""

import json
import sys
from typing import Any

import llama_cpp
import numpy as np


def followed(model: llama_cpp.Llama, ids: list[int], greedy: int) -> tuple[np.ndarray, np.ndarray]:
    """``ids`` in one batch and ``greedy`` tokens one by one, and the logits at all of them."""
    model.reset()
    model.eval(ids)
    ids = list(ids)
    for _ in range(greedy):
        ids.append(int(model.scores[len(ids) - 1].argmax()))
        model.eval(ids[-1:])
    return np.array(ids), np.array(model.scores[: len(ids)], dtype=np.float32)


def answers(asked: dict[str, Any]) -> dict[str, np.ndarray]:
    greedy = asked.get("greedy", 0)
    context = max([8, *(len(ids) + greedy for ids in asked.get("ids", []))])
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
        found[f"ids_{index}"], found[f"logits_{index}"] = followed(model, ids, greedy)
    for index, text in enumerate(asked.get("texts", [])):
        tokens = model.tokenize(text.encode("utf-8"), add_bos=True, special=asked.get("special", False))
        found[f"tokens_{index}"] = np.array(tokens)
    return found


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as request:
        np.savez(sys.argv[2], **answers(json.load(request)))
