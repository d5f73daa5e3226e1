"""Train a shipped model: ``python -m benchmarks.small_model.train --source DIR --out DIR [--family qwen2]``.

DIR holds CPython's documentation sources, for example ``/usr/share/doc/python3.11/html/_sources``
(Debian package python3.11-doc, Python licence) or the ``Doc`` folder of a CPython source tree.
The result is a Hugging Face directory with fp16 weights that loads in fp32. The Llama comes with tokenizer
and held-out texts; a model of another family is smaller and takes the tokenizer of the shipped Llama.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from benchmarks.small_model.corpus import read_documents, split_documents, write_jsonl

SEQ_LEN = 512


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE that starts every text with ``<s>``, as Llama tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=SEQ_LEN
    )


SIZES = {
    "llama": {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen2": {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 3},
}
CONFIGURATIONS: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def build_model(family: str, vocab_size: int) -> PreTrainedModel:
    config = CONFIGURATIONS[family](
        vocab_size=vocab_size,
        **SIZES[family],
        num_hidden_layers=6,
        head_dim=32,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.03,
        attn_implementation="sdpa",
    )
    return AutoModelForCausalLM.from_config(config)


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, constant, then linear decay over the last 45 %."""
    progress = step / steps
    return min(1.0, (step + 1) / (0.02 * steps), max(0.0, (1.0 - progress) / 0.45))


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Perplexity over non-overlapping windows of SEQ_LEN tokens; tokens (T,)."""
    model.eval()
    windows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    losses = [model(input_ids=w, labels=w).loss.item() for w in windows.split(8)]
    model.train()
    return math.exp(sum(losses) / len(losses))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write fp16 weights with a configuration that loads them in fp32: fp16 is slow on CPUs."""
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    steps: int,
    batch: int,
    checkpoint: Callable[[], None],
) -> None:
    optimizer_list = optimizers(model)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizer_list]
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(SEQ_LEN)
    order = torch.empty(0, dtype=torch.long)
    start = time.time()
    for step in range(steps):
        if len(order) < batch:  # a new epoch: windows at a random phase, in random order
            phase = int(torch.randint(SEQ_LEN, (1,), generator=generator))
            windows = torch.arange(phase, len(tokens) - SEQ_LEN, SEQ_LEN)
            order = windows[torch.randperm(len(windows), generator=generator)]
        rows, order = tokens[order[:batch, None] + offsets], order[batch:]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rates in zip(optimizer_list, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            rate = (step + 1) * batch * SEQ_LEN / (time.time() - start)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {rate:.0f} tokens/s", flush=True)
        if step % 300 == 299 or step == steps - 1:
            print(f"step {step}  held-out perplexity {perplexity(model, held_out):.2f}", flush=True)
            checkpoint()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=SIZES, default="llama")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    torch.manual_seed(0)
    splits = split_documents(read_documents(args.source))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.family == "llama":
        for split in ("calibration", "selection", "report"):
            write_jsonl(args.out / f"{split}.jsonl", splits[split])
        tokenizer = train_tokenizer(list(splits["train"].values()))
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(__file__).parent)
    encoded = {
        name: torch.cat([torch.tensor(tokenizer(t).input_ids) for t in docs.values()]) for name, docs in splits.items()
    }
    print({name: (len(splits[name]), len(ids)) for name, ids in encoded.items()}, flush=True)
    model = build_model(args.family, len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(
        model, encoded["train"], encoded["selection"], args.steps, args.batch, lambda: save(model, tokenizer, args.out)
    )
    report = perplexity(model, encoded["report"])
    print(f"report perplexity {report:.3f} (windows of {SEQ_LEN} tokens)")


if __name__ == "__main__":
    main()
