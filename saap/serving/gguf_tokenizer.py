"""A tokenizer as llama.cpp reads it: byte-level BPE ("gpt2") and BPE with byte fallback, SentencePiece's ("llama").

What is written is what the tokenizer does once transformers has loaded it, which its files need not say. Which way
llama.cpp splits text into words it must be told by name: the names below were checked on text
(tests/serving/llamacpp_cases.py), and other ways are refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the pre-tokenizer's steps, as ``_steps`` writes them, and whether merges are ignored for words of the vocabulary
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((LLAMA3, "bytes"), True): "llama-bpe",
    ((LLAMA3, "bytes"), False): "smaug-bpe",
    ((QWEN2, "bytes"), False): "qwen2",
    ((TEKKEN, "bytes"), True): "tekken",
}
SPACE = "▁"
PROBE = "a"  # what the tokenizer puts around it, it puts around any text


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; ``notes`` are for the user. ``tokens`` has an entry for every embedding."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add: dict[str, bool]
    chat_template: str | list[dict[str, str]] | None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        """Add it to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        for name, whether in self.add.items():
            (writer.add_add_space_prefix if name == "space" else getattr(writer, f"add_add_{name}_token"))(whether)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(folder: Path, config: PreTrainedConfig) -> Vocabulary:
    """The tokenizer of a model directory; raises ValueError for those that llama.cpp would not follow."""
    tokenizer = _load(folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{folder}: GGUF files are written with BPE tokenizers; this one is {model['type']}")
    notes: list[str] = []
    pieces = model["byte_fallback"]
    tokens, types = _tokens(tokenizer, config.vocab_size, pieces)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if not merges:
        raise ValueError(f"{folder}: llama.cpp needs a tokenizer with merges, this one has none")
    add = _added(tokenizer, folder)
    if pieces:
        add["space"] = _space_prefix(backend, folder)
        notes += _other_spaces(backend) + _incomplete(model["vocab"], merges)
    else:
        notes += _normalizer(backend, folder)
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else pre_tokenizer(backend, folder),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if pieces else None,
        merges=None if pieces else [f"{left} {right}" for left, right in merges],
        special=_special(tokenizer, config, folder),
        add=add,
        chat_template=_templates(tokenizer),
        notes=notes,
    )


def _load(folder: Path) -> PreTrainedTokenizerFast:
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            json.loads(file.read_text(encoding="utf-8"))["model"]["type"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{folder}: expected a tokenizer that tokenizer.json can hold, got {type(tokenizer).__name__}")
    return tokenizer


def _tokens(tokenizer: PreTrainedTokenizerFast, size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embeddings; rows without a token are there, unused."""
    import gguf

    known = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(known) >= size:
        raise ValueError(f"the tokenizer has a token {max(known)}, the model has embeddings for 0 to {size - 1}")
    added, unknown = tokenizer.added_tokens_decoder, tokenizer.unk_token
    tokens, types = [], []
    for index in range(size):
        token, kind = known.get(index), gguf.TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{index}]", gguf.TokenType.UNUSED
        elif pieces and token == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
            token = token if added[index].special or not pieces else token.replace(SPACE, " ")  # found in plain text
        elif pieces and len(token) == 6 and token.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    if len(set(tokens)) != len(tokens):
        raise ValueError("expected every token once in the tokenizer's vocabulary")
    return tokens, types


def _added(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, bool]:
    """Whether bos and eos are put around a text: {"bos": ..., "eos": ...}."""
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(PROBE)["input_ids"]
    before, after = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for bos in (False, True):
        for eos in (False, True):
            if whole == before * bos + plain + after * eos:
                return {"bos": bos, "eos": eos}
    raise ValueError(
        f"{folder}: llama.cpp puts bos and eos around a text; this tokenizer makes {whole} of {PROBE!r}, "
        f"with bos {before[0]} and eos {after[0]}"
    )


def _special(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, folder: Path) -> dict[str, int]:
    """Ids by llama.cpp's names; what a text ends with must be known, or llama.cpp takes some other token for it."""
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "sep", "pad", "mask")}
    ends = _as_list(config.eos_token_id)
    file = folder / "generation_config.json"
    if file.is_file():
        ends += _as_list(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
    if found["bos"] is None:
        found["bos"] = next(iter(_as_list(config.bos_token_id)), None)
    if found["eos"] is None and ends:
        found["eos"] = ends[0]
    if found["eos"] is None:
        raise ValueError(f"{folder}: neither tokenizer nor config.json says which token ends a text (eos_token)")
    others = [index for index in dict.fromkeys(ends) if index != found["eos"]]
    found |= dict(zip(("eot", "eom"), others, strict=False))  # of a turn: chat models end with these too
    return {name: index for name, index in found.items() if index is not None}


def _as_list(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _templates(tokenizer: PreTrainedTokenizerFast) -> str | list[dict[str, str]] | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def pre_tokenizer(backend: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name of the way that a byte-level tokenizer splits text into words; ValueError for others."""
    steps = _steps(backend["pre_tokenizer"])
    key = (steps, bool(backend["model"]["ignore_merges"]))
    if key not in PRE_TOKENIZERS:
        raise ValueError(
            f"{folder}: llama.cpp splits text into words in ways that it knows by name; of them "
            f"{', '.join(PRE_TOKENIZERS.values())} are recognised, this tokenizer's is another: "
            f"{json.dumps(backend['pre_tokenizer'])}, ignore_merges {str(key[1]).lower()}. A directory without "
            "tokenizer files is exported without a tokenizer"
        )
    return PRE_TOKENIZERS[key]


def _steps(step: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A pre-tokenizer in short: regular expressions that isolate words, and what ByteLevel and Digits do."""
    kind = "" if step is None else step["type"]
    if step is not None and kind == "Sequence":
        return tuple(short for each in step["pretokenizers"] for short in _steps(each))
    if step is not None and kind == "ByteLevel" and not step["add_prefix_space"]:
        return ("gpt2",) if step.get("use_regex", True) else ("bytes",)
    if step is not None and kind == "Digits" and step["individual_digits"]:
        return ("digits",)
    if step is not None and kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return (step["pattern"].get("Regex", kind),)
    return (f"other: {kind}",)


def _normalizer(backend: Mapping[str, Any], folder: Path) -> list[str]:
    """Notes about what is done to the text first: llama.cpp does nothing to it before byte-level BPE."""
    normalizer = backend["normalizer"]
    kind = None if normalizer is None else normalizer["type"]
    if kind not in (None, "NFC"):
        raise ValueError(f"{folder}: llama.cpp does not normalise text before byte-level BPE, this tokenizer by {kind}")
    return (
        [] if kind is None else ["llama.cpp does not bring text into NFC first, as this tokenizer does; most text is"]
    )


def _space_prefix(backend: Mapping[str, Any], folder: Path) -> bool:
    """Whether a space is put before a text, of a tokenizer that writes spaces as SPACE; ValueError for others."""
    normalizer, words = backend["normalizer"], backend["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    before = [step for step in steps if step["type"] == "Prepend" and step["prepend"] == SPACE]
    spaces = [step for step in steps if step["type"] == "Replace" and step["content"] == SPACE]
    meta = words is not None and words["type"] == "Metaspace" and words["replacement"] == SPACE and not words["split"]
    if len(before) + len(spaces) != len(steps) or bool(spaces) == meta or (words is not None and not meta):
        raise ValueError(
            f"{folder}: llama.cpp reads BPE with byte fallback as SentencePiece's, with {SPACE} for spaces and nothing "
            f"else done to the text; this tokenizer has normalizer {json.dumps(normalizer)} and pre_tokenizer "
            f"{json.dumps(words)}"
        )
    return words["prepend_scheme"] != "never" if meta else bool(before)


def _other_spaces(backend: Mapping[str, Any]) -> list[str]:
    """Notes where Metaspace, which SentencePiece's own way is not, puts no space and llama.cpp does."""
    words = backend["pre_tokenizer"]
    if words is None or words["prepend_scheme"] == "never":
        return []
    places = " or after a special token" * (words["prepend_scheme"] == "first")
    return [f"llama.cpp puts a space before all text; this tokenizer none before one that begins with a space{places}"]


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """SentencePiece's scores: the earlier a piece is merged the higher; those that nothing is merged into come last."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _incomplete(vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> list[str]:
    """Notes where llama.cpp, which merges any two pieces whose union is one, may merge what this tokenizer does not."""
    known = {tuple(pair) for pair in merges}
    pieces = {left + right for left, right in known}
    lacking = sum(
        piece[:cut] in vocab and piece[cut:] in vocab and (piece[:cut], piece[cut:]) not in known
        for piece in pieces
        for cut in range(1, len(piece))
    )
    if not lacking:
        return []
    return [f"llama.cpp may split some words otherwise: it makes {lacking} merges that this tokenizer does not have"]
