"""Whole-model calibration against the LLM-Pruner way: time and peak memory beyond the weights.

The peer is LLM-Pruner's mixed-order Taylor procedure, written afresh from its description: every
parameter requires grad, one backward per sample, squared gradients accumulated in weight-sized
buffers, then (in its own code) the gradient of the whole batch by a second set of passes; scores
from W * G and W^2 * F. Its redundant second pass is measured and left out in turn. Both sides use
the same chunked loss and dtype, and no activation checkpointing unless the case says so. The other
yardstick is one plain forward and backward that leaves weight gradients and computes no score. Each
variant runs in a process of its own.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Row, measure_in_processes, peak_of_device
from benchmarks.tasks import run_or_measure
from saap.calibrate import calibrate
from saap.families import family_of, layers_of, linears_of
from saap.loss import backward_sequence_losses
from saap.units import discover

VARIANTS = (
    "ours", "peer", "plain", "ours, checkpointing", "plain, checkpointing", "peer without second pass",
)  # fmt: skip
GPU_REPEATS = 3


@dataclass(frozen=True)
class Setting:
    """What is calibrated: a random Llama, the number and length of sequences."""

    name: str
    config: dict[str, int]
    samples: int
    seq_len: int
    dtype: torch.dtype
    batch: int | str  # sequences per micro-batch of ours and of the plain pass


def setting(quick: bool) -> Setting:
    """A GPU: Llama-2-7B's sizes in bf16, LLM-Pruner's own 10 x 64 tokens. A CPU: 325M (quick: 19M) in fp32."""
    if torch.cuda.is_available() and not quick:
        sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
        return Setting("Llama-2-7B", sizes | heads, 10, 64, torch.bfloat16, 10)
    size = {"hidden_size": 256, "num_hidden_layers": 4} if quick else {"hidden_size": 1024, "num_hidden_layers": 22}
    sizes = size | {"intermediate_size": 704 if quick else 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
    return Setting("19M Llama" if quick else "325M Llama", sizes, 16, 128, torch.float32, 4)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(chosen: Setting) -> LlamaForCausalLM:
    """The random model, made on the device."""
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **chosen.config)
    torch.manual_seed(0)
    with torch.device(device()):
        return LlamaForCausalLM._from_config(config, dtype=chosen.dtype).eval()


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


def plain_backward(model: LlamaForCausalLM, ids: torch.Tensor, batch: int, checkpointing: bool) -> None:
    """Forward and backward with gradients of the layers' weights, in micro-batches: the floor of any Taylor method."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.requires_grad_(True)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    for part in ids.split(batch):
        backward_sequence_losses(model, part)
    for layer in model.model.layers:
        vars(layer).pop("forward", None)  # a repetition must not wrap the wrapped


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
    chosen = setting(quick)
    model = build(chosen)
    ids = torch.randint(0, 32000, (chosen.samples, chosen.seq_len), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device())
    backward_sequence_losses(_warm_up_model(), ids[:1].cpu() % 64)  # thread pools and library initialisation
    times = []
    if device() == "cuda":
        run_variant(variant, model, ids, chosen)  # compiles the kernels and fills the allocator
    with peak_of_device(device()) as peak:
        for _ in range(GPU_REPEATS if device() == "cuda" else 1):
            start = time.perf_counter()
            run_variant(variant, model, ids, chosen)
            if device() == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return {"seconds": median(times), "bytes": float(peak()), "weights": float(weights)}


def run_variant(variant: str, model: LlamaForCausalLM, ids: torch.Tensor, chosen: Setting) -> None:
    checkpointing = "checkpointing" in variant
    if variant.startswith("ours"):
        options = {"samples": chosen.samples, "seq_len": chosen.seq_len, "batch_size": chosen.batch}
        calibrate(model, data=ids.cpu(), **options, checkpoint=checkpointing)
    elif variant.startswith("plain"):
        plain_backward(model, ids, int(chosen.batch), checkpointing)
        model.zero_grad(set_to_none=True)
    else:
        llm_pruner(model, ids, second_pass=variant == "peer")


def _warm_up_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def measure(quick: bool) -> Iterator[Row]:
    """Rows as soon as their variants are measured: alternating on a CPU, one variant after the other on a GPU.

    There each process repeats its variant itself: making the model again would cost more than the measurement.
    """
    on_gpu, chosen = device() == "cuda", setting(quick)
    middle: dict[str, dict[str, float]] = {}
    shown: set[tuple[str, str]] = set()
    for variants in [(variant,) for variant in VARIANTS] if on_gpu else [VARIANTS]:
        middle |= measure_in_processes("calibrate_model", variants, quick, repeats=1 if on_gpu else 3)
        for row in rows_of(middle, chosen, on_gpu):
            if (row.case, row.unit) not in shown:
                shown.add((row.case, row.unit))
                yield row


def rows_of(middle: dict[str, dict[str, float]], chosen: Setting, on_gpu: bool) -> list[Row]:
    """Every row whose variants are in ``middle``."""
    size = f"{chosen.name}, {chosen.samples} x {chosen.seq_len}"
    limit = "<= 0.25" if on_gpu else "<= 0.6"
    rows = []
    for ours in [name for name in middle if name.startswith("ours")]:
        label = f"{size}: {ours.replace('ours', 'saap')} / "
        mine = middle[ours]
        if on_gpu:
            whole = 1 + mine["bytes"] / mine["weights"]
            rows.append(Row.single(f"{size}: {ours}, peak memory / weights", whole, "ratio", "<= 1.15"))
        for peer in [name for name in middle if name.startswith("peer")]:
            case = f"{label}LLM-Pruner{peer.removeprefix('peer')}"
            asked = limit if peer == "peer" and ours == "ours" else ""
            rows.append(Row.compare(case, mine["seconds"], middle[peer]["seconds"], "s", asked))
            memory = mine["bytes"] / 2**20, middle[peer]["bytes"] / 2**20
            rows.append(Row.compare(case, *memory, "MiB", "<= 0.3"))
        plain = middle.get(ours.replace("ours", "plain"))
        if plain is not None:
            case = f"{label}forward and backward with weight gradients"
            rows.append(Row.compare(case, mine["seconds"], plain["seconds"], "s", "" if on_gpu else "<= 1.2"))
            rows.append(Row.compare(case, mine["bytes"] / 2**20, plain["bytes"] / 2**20, "MiB"))
    return rows


if __name__ == "__main__":
    run_or_measure(__doc__ or "", measure, measure_variant)
