"""LLM-Pruner's Taylor importance from one forward and one backward pass, without a gradient of any weight.

LLM-Pruner runs a backward pass per sample for squared gradients, another for the whole batch, and keeps
two weight-sized buffers. The lines between the markers replace that step; ``importance`` then holds, per
layer, what a local ranking sorts: one number per KV group and one per MLP channel, mixed order, with absolute
values per sequence (``collect(coupled=True)`` has the original, after the mean over sequences).

Run: python examples/llm_pruner_taylor.py MODEL TEXT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import saap


def importance_of(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """{"attention", "mlp": [(units,) per layer]}; ids (sequences, tokens)."""
    # -- instead of 2N backward passes ----------------------------------------------------------------
    with saap.collect(model, loss_scale=1 / len(ids)) as collected:
        model(input_ids=ids, labels=ids).loss.backward()
    statistics = collected.statistics
    importance = {
        name: module.salience.element_mean[2, module.rows.index("sum")].split(
            [layer.count(name) for layer in statistics.units.layers]
        )
        for name, module in statistics.modules.items()
    }
    # --------------------------------------------------------------------------------------------------
    return {name: list(layers) for name, layers in importance.items()}


def main(name: str, text: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    with open(text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[0]
    ids = ids[: len(ids) // 64 * 64].view(-1, 64)[:10]  # its own 10 x 64 tokens
    for module, layers in importance_of(model, ids).items():
        for index, scores in enumerate(layers):
            print(f"layer {index} {module}: first to go {scores.argsort()[:3].tolist()} of {len(scores)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
