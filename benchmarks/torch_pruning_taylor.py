"""Torch-Pruning's Taylor importance of every group: its own class against ``saap.adapters.torch_pruning``.

A random Llama (CPU and fp32: 200M parameters, quick: 3M), one backward pass over 4 x 128 tokens, then the
importance of every group: those of attention and MLP, then those of the hidden dimension too (where every
Linear loses rows and columns, and the adapter forms each weight gradient twice). Heads are not grouped:
Torch-Pruning 1.6 does not finish tracing grouped-query attention. The dependency graph is built before the
clock starts. Each variant runs in a process of its own, alternating; memory is the peak above the start.
"""

import time
import warnings

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Row, measure_in_processes, peak_memory
from benchmarks.tasks import run_or_measure

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
    middle = measure_in_processes("torch_pruning_taylor", VARIANTS, quick, repeats=5)
    rows = []
    for suffix, what in (("", "attention and MLP"), (", hidden", "all groups")):
        ours, peer = (middle[side + suffix] for side in ("ours", "peer"))
        if abs(ours["squares"] / peer["squares"] - 1) > 1e-5:  # another order of summation moves it by 2e-8
            raise RuntimeError(f"the two importances differ: {ours['squares']} and {peer['squares']}")
        case = f"{'3M' if quick else '200M'} Llama, 4 x 128, {what}: adapter / Torch-Pruning"
        rows.append(Row.compare(case, ours["seconds"], peer["seconds"], "s", "< 1"))
        rows.append(Row.compare(case, ours["bytes"] / 2**20, peer["bytes"] / 2**20, "MiB", "< 1"))
    return rows


if __name__ == "__main__":
    run_or_measure(__doc__ or "", measure, measure_variant)
