"""Tokens per second in llama.cpp: a Llama of 349M parameters with 20 % of all parameters removed, over the dense one.

Random weights, and random scores say what goes, so that the layers differ in heads and widths (architecture deci,
widths of a multiple of 32); both are GGUF files of the same type, written by ``saap export``. They are loaded in one
process, with flash attention, and take turns: a prompt of 128 tokens, then 32 tokens one by one, on as many threads as
torch has. A rate is the median over the turns. Decoding reads every weight once but the embeddings, of which it reads a
row: with a vocabulary of 32000 they are 9 % of the parameters, as much as the output head, which stays.
llama.cpp runs in the environment that ``make test-llamacpp`` makes; LLAMACPP_PYTHON names another one's Python.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import saap
from benchmarks.common import Row
from benchmarks.end_to_end import random_scores
from benchmarks.tasks import run
from saap.serving.gguf_export import export_gguf
from saap.units import discover

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("llamacpp_worker.py")
KINDS = ("q8_0", "f16", "q4_0")
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 32000}
QUICK_SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 512}
RUN = {"threads": torch.get_num_threads(), "context": 128, "tokens": 32, "turns": 9}
QUICK_RUN = RUN | {"context": 16, "tokens": 8, "turns": 3}


def python() -> str:
    """The Python that has llama_cpp; FileNotFoundError naming the command that makes it."""
    found = Path(os.environ.get("LLAMACPP_PYTHON", ROOT / ".venv-llamacpp/bin/python"))
    if not found.is_file():
        raise FileNotFoundError(f"no {found}: make test-llamacpp makes it, LLAMACPP_PYTHON names another one")
    return str(found)


def dense(quick: bool) -> PreTrainedModel:
    sizes = QUICK_SIZES if quick else SIZES
    heads = {"num_attention_heads": sizes["hidden_size"] // 64, "num_key_value_heads": sizes["hidden_size"] // 128}
    config = LlamaConfig(tie_word_embeddings=False, head_dim=64, **sizes, **heads)
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.float16).eval()


def rates(models: dict[str, Path], quick: bool) -> dict[str, dict[str, float]]:
    """{name: {"prompt": ..., "decode": ...}}, medians of tokens per second."""
    asked: dict[str, Any] = (QUICK_RUN if quick else RUN) | {"models": {name: str(p) for name, p in models.items()}}
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps(asked))
        done = subprocess.run([python(), WORKER, request], check=True, stdout=subprocess.PIPE, text=True, timeout=1800)
    found = json.loads(done.stdout.splitlines()[-1])
    for name, turns in found.items():
        print(f"{name}: " + ", ".join(f"{rate:.1f}" for rate in turns["decode"]) + " tokens/s", file=sys.stderr)
    return {name: {what: median(values) for what, values in turns.items()} for name, turns in found.items()}


def measure(quick: bool) -> Iterator[Row]:
    python()
    model = dense(quick)
    units = discover(model)
    plan = saap.search(random_scores(units), 0.2, multiple=32)
    name = f"{units.total_parameters / 1e6:.0f}M Llama, {plan.ratio:.1%} of all parameters removed / dense"
    with tempfile.TemporaryDirectory(prefix="saap-llamacpp-") as temporary:
        folder = Path(temporary)
        saap.save(model, folder / "dense")
        saap.save(saap.compact(model, plan), folder / "pruned")
        del model
        for kind in KINDS[:1] if quick else KINDS:
            files = {which: folder / f"{which}-{kind}.gguf" for which in ("pruned", "dense")}
            for which, file in files.items():
                export_gguf(folder / which, file, kind, tell=lambda note: None)
            found = rates(files, quick)
            for what, asked in (("decode", "" if quick else ">= 1.2"), ("prompt", "")):
                ours, peer = found["pruned"][what], found["dense"][what]
                yield Row.compare(f"{name}, {kind}, {what}", ours, peer, "tokens/s", asked)
            for file in files.values():
                file.unlink()


if __name__ == "__main__":
    run(__doc__ or "", measure)
