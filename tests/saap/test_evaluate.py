"""Perplexity by its protocol, costs by counting, and the comparison of two models."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from saap.compact import compact
from saap.cost import cost_of
from saap.data import encode
from saap.evaluate import evaluate, perplexity
from tests.saap.test_checkpoint import make_plan
from tests.saap.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = ["the first document, a little longer than the window.", "the second one. " * 6]


def brute_force(model, seq_len: int) -> tuple[float, int]:
    """Token-weighted mean loss over non-overlapping windows, one window at a time in float64."""
    ids = torch.cat([encode(TOKENIZER, text) for text in TEXT])
    total, tokens = 0.0, 0
    for start in range(0, len(ids), seq_len):
        window = ids[start : start + seq_len]
        if len(window) >= 2:
            logits = model(input_ids=window[None]).logits[0]
            total += float(F.cross_entropy(logits[:-1].double(), window[1:], reduction="sum"))
            tokens += len(window) - 1
    return total / tokens, tokens


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("seq_len", [7, 16, 64])
def test_perplexity_is_the_token_weighted_mean_over_windows(family: str, seq_len: int) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        loss, tokens = brute_force(model, seq_len)
    found = evaluate(model, TOKENIZER, TEXT, seq_len=seq_len)
    assert found.loss == pytest.approx(loss, rel=1e-9) and found.tokens == tokens
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-9)
    assert perplexity(model, TOKENIZER, TEXT, seq_len=seq_len) == found.perplexity


def test_seq_len_is_cut_to_the_models_positions() -> None:
    assert evaluate(tiny_model("llama"), TOKENIZER, TEXT).seq_len == 64


def test_costs_are_counted_from_the_weights() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    plan = make_plan(model)
    dense = cost_of(model, 64)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert dense.parameters == sum(p.numel() for p in model.parameters())
    assert dense.macs_per_token == linear + 3 * 2 * 64 * 64
    assert dense.weight_bytes == 8 * dense.parameters
    assert dense.kv_cache_bytes_per_token == 3 * 2 * 4 * 8 * 8
    pruned = cost_of(compact(model, plan), 64)
    assert dense.parameters - pruned.parameters == plan.removed_parameters
    assert pruned.kv_cache_bytes_per_token == 2 * (3 + 1 + 4) * 8 * 8


def test_dense_and_pruned_are_measured_in_one_run() -> None:
    dense = tiny_model("llama", torch.float32)
    pruned = compact(dense, make_plan(dense), copy=True).train()
    seen: list[tuple[int, int]] = []
    found = evaluate(pruned, TOKENIZER, TEXT, seq_len=16, against=dense, progress=lambda *p: seen.append(p))
    assert (
        found.against is not None
        and found.against.perplexity == evaluate(dense, TOKENIZER, TEXT, seq_len=16).perplexity
    )
    assert found.parameters < found.against.parameters and found.tokens_per_second > 0
    assert isinstance(found.sample, str) and found.sample and pruned.training
    assert seen.count((found.windows, found.windows)) == 2
    assert json.loads(found.to_json())["against"]["parameters"] == found.against.parameters
    again = evaluate(pruned, TOKENIZER, TEXT, seq_len=16, against=found.against)
    assert again.against == found.against


def test_bad_input_is_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="expected at least 2 tokens of text to evaluate on, got 1"):
        evaluate(model, None, torch.tensor([5]))
    with pytest.raises(ValueError, match="seq_len must be at least 2; got 1"):
        evaluate(model, TOKENIZER, TEXT, seq_len=1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="expected a finite loss on the evaluation text, got nan"):
        evaluate(model, TOKENIZER, TEXT)
