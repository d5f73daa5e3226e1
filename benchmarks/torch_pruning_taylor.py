"""Torch-Pruning's Taylor importance of every group: its own class against ``saap.adapters.torch_pruning``.

A random Llama (CPU and fp32: 200M parameters, quick: 5M), one backward pass over 4 x 128 tokens, then the
importance of every group: those of attention and MLP, then those of the hidden dimension too (where every
Linear loses rows and columns, and the adapter forms each weight gradient twice). Heads are not grouped:
Torch-Pruning 1.6 does not finish tracing grouped-query attention. The dependency graph is built before the
clock starts. Each variant runs in a process of its own, alternating; memory is the peak above the start.
"""

import json
import statistics
import subprocess
import sys
import time
import warnings

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Row, peak_memory, run

VARIANTS = ("ours", "peer", "ours, hidden", "peer, hidden")


def build(quick: bool) -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    if not quick:
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8192, tie_word_embeddings=False, attn_implementation="eager", **sizes, **heads)
    model = LlamaForCausalLM(config).eval()
    model.config.use_cache = False
    return model


def measure_variant(variant: str, quick: bool) -> dict[str, float]:
    """Seconds and peak bytes above the weights, and a checksum of the importance, of one variant in this process."""
    import torch_pruning as tp

    from saap.adapters.torch_pruning import TaylorImportance

    model = build(quick)
    ids = torch.randint(0, 8192, (4, 128), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, ids[:1, :8], output_transform=lambda output: output.logits)
    ignored = [model.lm_head]
    if not variant.endswith("hidden"):
        ignored += [m for name, m in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    groups = list(graph.get_all_groups(ignored_layers=ignored, root_module_types=[nn.Linear]))
    ours = variant.startswith("ours")
    importance = TaylorImportance() if ours else tp.importance.GroupTaylorImportance()
    with torch.no_grad():
        model(input_ids=ids[:1, :8])  # thread pools
    model.zero_grad()
    with peak_memory() as peak:
        start = time.perf_counter()
        if ours:
            with importance.collect(model, groups):
                model(input_ids=ids, labels=ids).loss.backward()
        else:
            model(input_ids=ids, labels=ids).loss.backward()
        scores = [importance(group) for group in groups]
        seconds = time.perf_counter() - start
    spread = sum(float(score.double().square().sum()) for score in scores)
    return {"seconds": seconds, "bytes": float(peak()), "squares": spread}


def measure(quick: bool) -> list[Row]:
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(1 if quick else 5):
        for variant in VARIANTS:
            options = ["--variant", variant, *(["--quick"] * quick)]
            command = [sys.executable, "-m", "benchmarks.torch_pruning_taylor", *options]
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for suffix, what in (("", "attention and MLP"), (", hidden", "all groups")):
        ours, peer = (_medians(results[side + suffix]) for side in ("ours", "peer"))
        if abs(ours["squares"] / peer["squares"] - 1) > 1e-3:  # another sum order moves it by 1e-5
            raise RuntimeError(f"the two importances differ: {ours['squares']} and {peer['squares']}")
        case = f"{'5M' if quick else '200M'} Llama, 4 x 128, {what}: adapter / Torch-Pruning"
        rows.append(Row.compare(case, ours["seconds"], peer["seconds"], "s", "< 1"))
        rows.append(Row.compare(case, ours["bytes"] / 2**20, peer["bytes"] / 2**20, "MiB", "< 1"))
    return rows


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    if "--variant" in sys.argv:
        chosen = sys.argv[sys.argv.index("--variant") + 1]
        print(json.dumps(measure_variant(chosen, "--quick" in sys.argv)))
    else:
        run(__doc__ or "", measure)
