"""Decodes with llama.cpp for ``benchmarks.llamacpp_speed``, in the environment that has it: nothing but llama_cpp.

``python llamacpp_worker.py REQUEST``: REQUEST is JSON {"models": {name: GGUF file}, "threads", "context", "tokens",
"turns"}. All models stay loaded and take turns of ``tokens`` tokens, one by one, after a prompt of ``context`` tokens.
Prints {name: {"decode": tokens per second of each turn, "prompt": of each turn}} as JSON.
"""

import json
import random
import sys
import time
from typing import Any

import llama_cpp


class Decoder:
    """One model in the middle of a text of random tokens."""

    def __init__(self, file: str, asked: dict[str, Any]) -> None:
        threads, self.context, self.tokens = asked["threads"], asked["context"], asked["tokens"]
        self.model = llama_cpp.Llama(
            file,
            n_ctx=self.context + self.tokens,
            n_batch=self.context,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,  # without it llama.cpp pads the values of all layers to the widest
            verbose=False,
        )

    def turn(self, seed: int) -> tuple[float, float]:
        """Tokens per second of the prompt, and of the tokens after it, one at a time."""
        draw = random.Random(seed)
        ids = [draw.randrange(self.model.n_vocab()) for _ in range(self.context + self.tokens)]
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(ids[: self.context])
        middle = time.perf_counter()
        for token in ids[self.context :]:
            self.model.eval([token])
        return self.context / (middle - start), self.tokens / (time.perf_counter() - middle)


def main(request: str) -> None:
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    decoders = {name: Decoder(model, asked) for name, model in asked["models"].items()}
    found: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "decode": []} for name in decoders}
    for turn in range(-1, asked["turns"]):  # the first fills caches and is not counted
        for name, decoder in decoders.items():
            prompt, decode = decoder.turn(turn)
            if turn >= 0:
                found[name]["prompt"].append(prompt)
                found[name]["decode"].append(decode)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
