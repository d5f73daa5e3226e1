"""Tokens per second of greedy decoding, batch 1: a dense Llama and structurally smaller ones, plain and accelerated.

Random weights; 20 % and 50 % of all parameters are removed by plans of random scores at widths of any size, so that
the layers differ. One decoding loop for all: transformers' forward with a static cache, after a prompt of 256 tokens.
A smaller model is compared with the dense one plain, and accelerated as it is itself. Variants take turns of a few
tokens; each one's rate is the median over its turns. On a GPU the forward is compiled with CUDA graphs.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import saap
from benchmarks.common import Row
from benchmarks.tasks import run
from saap.scores import Scores
from saap.units import Units, discover

RATIOS = (0.0, 0.2, 0.5)
BITS = (None, 8, 4)
DENSE_ACCELERATED = "dense, accelerate(bits=None)"


@dataclass(frozen=True)
class Setting:
    """The model, and how much is decoded: ``turns`` of ``tokens`` tokens after ``context``."""

    config: dict[str, int]
    dtype: torch.dtype
    context: int
    tokens: int
    turns: int


def setting(quick: bool) -> Setting:
    """A GPU: Llama-2-7B's sizes in bf16. A CPU: 692M (quick: 3M) in fp32, a vocabulary small beside the layers."""
    if torch.cuda.is_available() and not quick:
        sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32000}
        return Setting(sizes | {"num_attention_heads": 32}, torch.bfloat16, 256, 16, 9)
    layers = {"num_hidden_layers": 4 if quick else 24, "vocab_size": 512 if quick else 4096}
    sizes = (
        {"hidden_size": 256, "intermediate_size": 704} if quick else {"hidden_size": 1536, "intermediate_size": 4096}
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return Setting(
        layers | sizes | {"num_attention_heads": sizes["hidden_size"] // 64},
        dtype,
        64 if quick else 256,
        2,
        2 if quick else 16,
    )


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dense(chosen: Setting) -> PreTrainedModel:
    config = LlamaConfig(tie_word_embeddings=False, **chosen.config)
    torch.manual_seed(0)
    with torch.device(device()):
        return LlamaForCausalLM._from_config(config, dtype=chosen.dtype).eval()


def random_scores(units: Units) -> Scores:
    """Uniform numbers times the unit's parameters, so that heads and channels go alike."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for module in ("attention", "mlp"):
        costs = [torch.full((layer.count(module),), float(layer.unit_parameters(module))) for layer in units.layers]
        cost = torch.cat(costs).double()
        values.append(torch.rand(len(cost), generator=generator, dtype=torch.float64) * cost)
    return Scores.of(units, values, {"criterion": "random"})


class Decoder:
    """One model in the middle of greedy decoding."""

    def __init__(self, model: PreTrainedModel, chosen: Setting) -> None:
        length = chosen.context + chosen.tokens * (chosen.turns + 1)
        self.cache, self.tokens = StaticCache(config=model.config, max_cache_len=length), chosen.tokens
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(0, model.config.vocab_size, (1, chosen.context), generator=generator).to(model.device)
        self.token = self._next(model, prompt)
        self.forward = torch.compile(model, mode="reduce-overhead") if model.device.type == "cuda" else model
        self.turn()  # compiles

    def _next(self, forward: Callable[..., object], ids: Tensor) -> Tensor:
        output = forward(input_ids=ids, past_key_values=self.cache, use_cache=True)
        return output.logits[:, -1:].argmax(-1).clone()  # type: ignore[attr-defined]  # a graph's result is overwritten

    def turn(self) -> float:
        """Tokens per second."""
        start = time.perf_counter()
        for _ in range(self.tokens):
            self.token = self._next(self.forward, self.token)
            int(self.token)  # waits for the device, as whoever reads the token does
        return self.tokens / (time.perf_counter() - start)


@torch.no_grad()
def rates(models: dict[str, PreTrainedModel], chosen: Setting) -> dict[str, float]:
    """{name: median tokens per second}, turns alternating."""
    torch.compiler.reset()  # or the models before use up how often one forward may be compiled
    decoders = {name: Decoder(model, chosen) for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(chosen.turns):
        for name, decoder in decoders.items():
            found[name].append(decoder.turn())
    return {name: median(values) for name, values in found.items()}


def accelerated(model: PreTrainedModel, bits: int | None) -> PreTrainedModel:
    result = copy.deepcopy(model)
    print(f"accelerate(bits={bits}): {saap.accelerate(result, bits=bits)}".replace("\n", "; "), flush=True)
    return result


def measure(quick: bool) -> Iterator[Row]:
    chosen = setting(quick)
    model = dense(chosen)
    scores = random_scores(discover(model))
    for ratio in RATIOS:
        plan = saap.search(scores, ratio, multiple=1) if ratio else None
        smaller = saap.compact(model, plan, copy=True) if plan else model
        models = {"dense": model}
        if plan:
            models |= {DENSE_ACCELERATED: accelerated(model, None), "plain": smaller}
        models |= {f"accelerate(bits={bits})": accelerated(smaller, bits) for bits in BITS}
        yield from rows_of(rates(models, chosen), model, 0.0 if plan is None else plan.ratio, quick)


def rows_of(found: dict[str, float], model: PreTrainedModel, ratio: float, quick: bool) -> Iterator[Row]:
    """Each variant against the dense model as it is and, if smaller, against itself as it is."""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    name = f"{size:.0f}M Llama" + (f", {ratio:.1%} of all parameters removed" if ratio else "")
    peers = {"dense": "dense", DENSE_ACCELERATED: DENSE_ACCELERATED, "plain": "the same, plain"}
    for variant, rate in found.items():
        for peer, spelt in peers.items():
            if variant not in ("dense", DENSE_ACCELERATED, peer) and _fair(variant, peer) and peer in found:
                asked = "" if quick or device() == "cuda" else _asked(variant, peer, ratio)
                case = f"{name}: {variant} / {spelt}"
                yield Row.compare(case, rate, found[peer], "tokens/s", asked)


def _fair(variant: str, peer: str) -> bool:
    """The accelerated dense model has its weights as they are: so has what it is compared with."""
    return peer != DENSE_ACCELERATED or variant == "accelerate(bits=None)"


def _asked(variant: str, peer: str, ratio: float) -> str:
    if peer == DENSE_ACCELERATED and 0.2 <= ratio < 0.3:
        return ">= 1.2"
    return ">= 1.5" if peer == "dense" and not ratio and variant == "accelerate(bits=8)" else ""


if __name__ == "__main__":
    run(__doc__ or "", measure)
