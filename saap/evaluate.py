"""Evaluation: perplexity, speed, size and a sample of text, dense against pruned in one run."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from saap.cost import cost_of
from saap.data import Document, check_tokenizer, encode, load_documents
from saap.loss import final_logits

BATCH_TOKENS = 4096
PROMPT_TOKENS, SAMPLE_TOKENS = 24, 32
DECODE_PROMPT, DECODE_TOKENS, DECODE_REPEATS = 32, 48, 3
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Measurements of one model; ``against`` holds those of the model it was compared with.

    ``perplexity`` is exp of the token-weighted mean loss over ``tokens`` predicted tokens in ``windows``
    non-overlapping windows of ``seq_len`` tokens; ``tokens_per_second`` is greedy decoding of one
    sequence with the cache, median of several runs, on ``device``; ``sample`` is the greedy continuation of
    ``prompt``.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    seq_len: int
    parameters: int
    macs_per_token: int
    weight_bytes: int
    kv_cache_bytes_per_token: int
    tokens_per_second: float
    sample: str
    dtype: str
    device: str
    prompt: str = ""
    against: "Evaluation | None" = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Any,
    *,
    seq_len: int = 2048,
    against: "PreTrainedModel | Evaluation | None" = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure perplexity on ``text`` (any form ``load_documents`` reads), speed, size and a sample.

    ``seq_len`` is cut to the model's positions; the result says what was used. ``against`` is another
    model, measured in the same run with its decoding runs alternating with ours, or an earlier
    Evaluation. ``progress(done, total)`` counts windows of each model in turn. Raises ValueError for
    text that is too short, a tokenizer of another model, and a loss that is not finite.
    """
    documents = load_documents(text)
    models = [model, against] if isinstance(against, PreTrainedModel) else [model]
    for each in models:
        if tokenizer is not None:
            check_tokenizer(each, tokenizer)
    seq_len = min(seq_len, *(_positions(each, seq_len) for each in models))
    windows = _windows(tokenizer, documents, seq_len)
    losses = [_mean_loss(each, windows, progress) for each in models]
    speeds = _decode_speeds(models, windows[0])
    results: list[Evaluation] = []
    for each, (loss, tokens), speed in zip(reversed(models), reversed(losses), reversed(speeds), strict=True):
        static = cost_of(each, seq_len)
        results.append(
            Evaluation(
                math.exp(loss),
                loss,
                tokens,
                len(windows),
                seq_len,
                **asdict(static),
                tokens_per_second=speed,
                sample=_sample(each, tokenizer, windows[0]),
                prompt="" if tokenizer is None else _text(tokenizer, windows[0][:PROMPT_TOKENS]),
                dtype=str(each.dtype).removeprefix("torch."),
                device=str(each.device),
                against=results[0] if results else (against if isinstance(against, Evaluation) else None),
            )
        )
    return results[-1]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Sequence[Document],
    *,
    seq_len: int = 2048,
    progress: Progress | None = None,
) -> float:
    """Perplexity alone, by the protocol of ``evaluate``."""
    seq_len = min(seq_len, _positions(model, seq_len))
    return math.exp(_mean_loss(model, _windows(tokenizer, documents, seq_len), progress)[0])


def _positions(model: PreTrainedModel, default: int) -> int:
    return getattr(model.config, "max_position_embeddings", None) or default


def _windows(tokenizer: PreTrainedTokenizerBase | None, documents: Sequence[Document], seq_len: int) -> list[Tensor]:
    """All documents joined and cut into non-overlapping windows; the last may be shorter, at least 2 tokens."""
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2; got {seq_len}")
    ids = torch.cat([encode(tokenizer, document) for document in documents])
    windows = [window for window in ids.split(seq_len) if len(window) >= 2]
    if not windows:
        raise ValueError(f"expected at least 2 tokens of text to evaluate on, got {len(ids)}")
    return windows


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, windows: list[Tensor], progress: Progress | None) -> tuple[float, int]:
    """Token-weighted mean next-token loss and the number of predicted tokens."""
    training = model.training
    model.eval()
    full = [window for window in windows if len(window) == len(windows[0])]
    batch = max(1, BATCH_TOKENS // len(windows[0]))
    groups = [full[start : start + batch] for start in range(0, len(full), batch)]
    groups += [[window] for window in windows[len(full) :]]
    total, tokens, done = 0.0, 0, 0
    try:
        for group in groups:
            ids = torch.stack(group).to(model.device)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            for rows, targets in zip(hidden.split(512), ids[:, 1:].flatten().split(512), strict=True):
                logits = final_logits(model, model.get_output_embeddings()(rows))
                total += float(F.cross_entropy(logits, targets, reduction="sum"))
            tokens += ids[:, 1:].numel()
            done += len(group)
            if progress is not None:
                progress(done, len(windows))
    finally:
        model.train(training)
    if not math.isfinite(total):
        raise ValueError(f"expected a finite loss on the evaluation text, got {total}")
    return total / tokens, tokens


@torch.no_grad()
def _decode(model: PreTrainedModel, prompt: Tensor, tokens: int) -> float:
    """Seconds per token of greedy decoding after the prompt; prompt (T,)."""
    cache = DynamicCache(config=model.config)
    output = model(input_ids=prompt[None], past_key_values=cache, use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        int(token)  # waits for the device
    return (time.perf_counter() - start) / tokens


def _decode_speeds(models: Sequence[PreTrainedModel], window: Tensor) -> list[float]:
    """Tokens per second of each model, runs alternating so that a drifting clock treats both alike."""
    tokens = min(DECODE_TOKENS, *(_positions(model, 1 << 30) - 2 for model in models))
    prompt = window[: max(1, min(DECODE_PROMPT, *(_positions(model, 1 << 30) - tokens - 1 for model in models)))]
    times: list[list[float]] = [[] for _ in models]
    states = [model.training for model in models]
    for repeat in range(DECODE_REPEATS + 1):
        for model, found in zip(models, times, strict=True):
            seconds = _decode(model.eval(), prompt.to(model.device), tokens)
            if repeat:  # the first run warms up
                found.append(seconds)
    for model, training in zip(models, states, strict=True):
        model.train(training)
    return [1 / statistics.median(found) for found in times]


def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, window: Tensor) -> str:
    """Greedy continuation of the text's first tokens; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    prompt = window[None, : min(PROMPT_TOKENS, len(window))].to(model.device)
    room = max(1, min(SAMPLE_TOKENS, _positions(model, 1 << 30) - prompt.shape[1]))
    with torch.no_grad():
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=room, do_sample=False, pad_token_id=0
        )
    return _text(tokenizer, ids[0, prompt.shape[1] :])


def _text(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
