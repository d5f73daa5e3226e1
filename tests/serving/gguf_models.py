"""Models for the tests of GGUF files: tiny, random, with rows of whole blocks, and tokenizers with merges."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import saap
from saap.plan import LayerPlan, Plan
from saap.units import discover
from tests.saap.tiny import tiny_model

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 256, 8, 4, 32, 128, 400
SIZES = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    "intermediate_size": WIDTH, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
OWN = {"qwen3": {"attention_bias": False}, "mistral": {"sliding_window": None}}  # what GGUF files can be made of
ALL = ((4, 128), (4, 128), (4, 128))  # KV heads and channels that the layers keep
UNIFORM = ((2, 96), (2, 96), (2, 96))
DIFFERENT = ((4, 128), (3, 32), (1, 96))
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def model_of(family: str, kept: Sequence[tuple[int, int]] = ALL, **overrides) -> PreTrainedModel:
    """An fp32 model whose layers keep so many KV heads and channels, not the first ones."""
    model = tiny_model(family, torch.float32, **SIZES | OWN.get(family, {}) | overrides)
    if tuple(kept) == ALL:
        return model
    units = discover(model)
    layers = tuple(
        LayerPlan(tuple(range(KV_HEADS - kv, KV_HEADS)), tuple(range(WIDTH - width, WIDTH))) for kv, width in kept
    )
    return saap.compact(model, Plan(units, layers, {"allow_empty": True}))


def saved(folder: Path, family: str, kept: Sequence[tuple[int, int]] = ALL, tokenizer=None, **overrides) -> Path:
    """The directory of ``model_of``, written by ``saap.save``."""
    saap.save(model_of(family, kept, **overrides), folder, tokenizer=tokenizer, force=True)
    return folder


def byte_level_tokenizer(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, ignore_merges: bool = False, size: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on this repository's README; bos is put first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|turn|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return _with_bos(tokenizer)


def splitting(pattern: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of Llama 3, Qwen2 and others: words by a regular expression, then bytes."""
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """BPE with byte fallback as converted from SentencePiece's: all merges of every piece, spaces as pieces."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size - 259))
    learnt = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(token for token, _ in learnt)]
    vocab = {token: index for index, token in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in names[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _with_bos(tokenizer, unk_token="<unk>")


def of_class(kind: type[PreTrainedTokenizerFast], learnt: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """transformers' own tokenizer class over the vocabulary and merges of another tokenizer."""
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return kind(vocab=model["vocab"], merges=merges, bos_token="<s>", eos_token="</s>", unk_token=model["unk_token"])


def _with_bos(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special)
