"""Whole-model calibration against the LLM-Pruner way: time and peak memory beyond the weights.

The peer is LLM-Pruner's mixed-order Taylor procedure, written afresh from its description: every
parameter requires grad, one backward per sample, squared gradients accumulated in weight-sized
buffers, then (in its own code) the gradient of the whole batch by a second set of passes; scores
from W * G and W^2 * F. Its redundant second pass is measured and left out in turn. Both sides use
the same chunked loss, fp32, and no activation checkpointing unless the case says so. The other
yardstick is one plain forward and backward that leaves weight gradients and computes no score. Each
variant runs in a process of its own, alternating.
"""

import json
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Row, peak_memory, run
from saap.calibrate import calibrate
from saap.families import family_of, layers_of, linears_of
from saap.loss import backward_sequence_losses
from saap.units import discover

SAMPLES, SEQ_LEN = 16, 128
BATCH = 4  # sequences per micro-batch of the plain backward pass: what "auto" takes here, 512 tokens
VARIANTS = (
    "ours", "plain", "ours, checkpointing", "plain, checkpointing", "peer", "peer without second pass",
)  # fmt: skip


def build(quick: bool) -> LlamaForCausalLM:
    """A random Llama of about 350M parameters (quick: 25M)."""
    size = {"hidden_size": 256, "num_hidden_layers": 4} if quick else {"hidden_size": 1024, "num_hidden_layers": 22}
    config = LlamaConfig(
        vocab_size=32000,
        intermediate_size=2816 if not quick else 704,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        **size,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def llm_pruner(model: LlamaForCausalLM, ids: torch.Tensor, second_pass: bool) -> list[torch.Tensor]:
    """Mixed-order element scores of every unit's matrices by per-sample gradients of all parameters."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    squares: dict[str, torch.Tensor] = {}
    means: dict[str, torch.Tensor] = {}
    for sample in ids:
        _backward_all(model, sample[None])
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            square = parameter.grad * parameter.grad / len(ids)
            squares[name] = squares[name] + square if name in squares else square
            if not second_pass:
                means[name] = means[name] + parameter.grad if name in means else parameter.grad.clone()
        model.zero_grad(set_to_none=True)
    if second_pass:
        _backward_all(model, ids)
    scores = []
    family, units = family_of(model), discover(model)
    for index, layer in enumerate(layers_of(model, family)):
        for part, linear in linears_of(layer, family).items():
            name = f"{family.layers}.{index}.{family.path(part)}.weight"
            gradient = (linear.weight.grad if second_pass else means[name]) / len(ids)
            salience = linear.weight.detach() * gradient
            salience = salience - 0.5 * linear.weight.detach().square() * squares[name]
            per_row = salience.abs().sum(0 if part in ("o", "down") else 1)
            scores.append(per_row.view(-1, units.layers[index].rows_per_unit(part)).sum(1))
    model.zero_grad(set_to_none=True)
    return scores


def plain_backward(model: LlamaForCausalLM, ids: torch.Tensor, checkpointing: bool) -> None:
    """Forward and backward with gradients of the layers' weights, in micro-batches: the floor of any Taylor method."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.requires_grad_(True)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    for batch in ids.split(BATCH):
        backward_sequence_losses(model, batch)


def _backward_all(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Backward into every parameter, output head included, with the chunked loss of both sides."""
    from torch.nn import functional as F

    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    rows = hidden.detach()[:, :-1].flatten(0, 1).requires_grad_()
    targets = ids[:, 1:].flatten()
    for chunk in torch.arange(len(rows)).split(512):
        loss = F.cross_entropy(model.lm_head(rows[chunk]).float(), targets[chunk], reduction="sum")
        (loss / (ids.shape[1] - 1)).backward()
    gradient = torch.zeros_like(hidden)
    gradient[:, :-1] = rows.grad.view(len(ids), -1, hidden.shape[-1])
    hidden.backward(gradient)


def measure_variant(variant: str, quick: bool) -> dict[str, float]:
    """Seconds and peak bytes beyond the weights of one variant, in this process."""
    model = build(quick)
    ids = torch.randint(0, 32000, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    backward_sequence_losses(_warm_up_model(), ids[:1] % 64)  # thread pools and library initialisation
    with peak_memory() as peak:
        start = time.perf_counter()
        if variant.startswith("ours"):
            calibrate(model, data=ids, samples=SAMPLES, seq_len=SEQ_LEN, checkpoint="checkpointing" in variant)
        elif variant.startswith("plain"):
            plain_backward(model, ids, "checkpointing" in variant)
        else:
            llm_pruner(model, ids, second_pass=variant == "peer")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": float(peak()), "parameters": float(sum(p.numel() for p in model.parameters()))}


def _warm_up_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def measure(quick: bool) -> list[Row]:
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(1 if quick else 3):
        for variant in VARIANTS:
            command = [sys.executable, "-m", "benchmarks.calibrate_model", "--variant", variant, *(["--quick"] * quick)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[variant].append(json.loads(output.splitlines()[-1]))
            print(f"{variant}: {results[variant][-1]['seconds']:.2f} s", file=sys.stderr)
    middle = {v: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for v, rows in results.items()}
    size = f"{middle['ours']['parameters'] / 1e6:.0f}M Llama, {SAMPLES} x {SEQ_LEN}"
    rows = []
    for ours in ("ours", "ours, checkpointing"):
        for peer in ("peer", "peer without second pass"):
            label = f"{size}: {ours.replace('ours', 'saap')} / LLM-Pruner{peer.removeprefix('peer')}"
            asked = peer == "peer" and ours == "ours"
            pair = middle[ours], middle[peer]
            rows.append(Row.compare(label, pair[0]["seconds"], pair[1]["seconds"], "s", "<= 0.6" if asked else ""))
            rows.append(Row.compare(label, pair[0]["bytes"] / 2**20, pair[1]["bytes"] / 2**20, "MiB", "<= 0.3"))
        label = f"{size}: {ours.replace('ours', 'saap')} / forward and backward with weight gradients"
        plain = middle[ours.replace("ours", "plain")]
        rows.append(Row.compare(label, middle[ours]["seconds"], plain["seconds"], "s", "<= 1.2"))
        rows.append(Row.compare(label, middle[ours]["bytes"] / 2**20, plain["bytes"] / 2**20, "MiB"))
    return rows


if __name__ == "__main__":
    if "--variant" in sys.argv:
        chosen = sys.argv[sys.argv.index("--variant") + 1]
        print(json.dumps(measure_variant(chosen, "--quick" in sys.argv)))
    else:
        run(__doc__ or "", measure)
