"""The texts of the 7B protocol: what perplexity is measured on, and what calibration reads."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from saap.data import Document, load_documents

JOINED_BY = "\n\n"  # between the rows of a perplexity text, as GPTQ's and LLM-Pruner's evaluations join them


@dataclass(frozen=True)
class HubText:
    """Rows on the hub: what ``datasets.load_dataset`` is asked for, the column, and how rows make documents.

    ``rows`` streams that many from the start; ``per_document`` consecutive rows make one document.
    """

    path: str
    about: str
    split: str = "train"
    column: str = "text"
    options: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    per_document: int = 1

    def load(self) -> list[Document]:
        import datasets

        streamed = self.rows is not None
        try:
            rows = datasets.load_dataset(self.path, split=self.split, streaming=streamed, **self.options)
            texts = [row[self.column] for row in islice(rows, self.rows)]
        except (OSError, ValueError) as error:  # offline, unknown or gated: the library's message says which
            raise ValueError(f"cannot load {self.path}: {error}; give a local file instead") from error
        step = self.per_document
        return [" ".join(texts[start : start + step]) for start in range(0, len(texts), step)]


TEXTS = {
    "wikitext2": HubText(
        "Salesforce/wikitext", "WikiText-2 test, raw text", "test", options={"name": "wikitext-2-raw-v1"}
    ),
    # The data set itself is a script, which datasets 4 and later refuse: these are the hub's own parquet copies of it.
    "ptb": HubText(
        "parquet",
        "Penn Treebank validation (the split that LLM-Pruner evaluates on), tokenised text: lower case, `<unk>`, N",
        column="sentence",
        options={
            "data_files": "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet"
            "/penn_treebank/validation/0000.parquet"
        },
    ),
    # The original is a script, too, and its files are gone. A row is one sentence, in the order of its book.
    "bookcorpus": HubText(
        "rojagtap/bookcorpus",
        "BookCorpus (parquet copy), the first 200,000 sentences, 64 to a document",
        rows=200_000,
        per_document=64,
    ),
    "c4": HubText(
        "allenai/c4",
        "C4, the first 20,000 pages of its first file",
        options={"data_files": "en/c4-train.00000-of-01024.json.gz"},
        rows=20_000,
    ),
}


def parse_texts(items: Sequence[str]) -> dict[str, str]:
    """["wikitext2", "mine=FILE"] -> {"wikitext2": "wikitext2", "mine": "FILE"}; raises ValueError for unknown names."""
    found: dict[str, str] = {}
    for item in items:
        name, given, source = item.partition("=")
        if name in found:
            raise ValueError(f"--perplexity-data: expected different names; got {name} twice")
        found[name] = source if given else name
        check_text(found[name], "--perplexity-data")
    return found


def check_text(source: str, option: str) -> None:
    """Raise ValueError or FileNotFoundError unless ``source`` is of ``TEXTS``, a hub text or an existing file."""
    if source in TEXTS or source.startswith("hub:"):
        return
    if Path(source).suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{option}: unknown text {source!r}; known: {', '.join(TEXTS)}, hub:NAME[:CONFIG], a .txt or a .jsonl file"
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"{option}: no such file: {source}")


def load_text(source: str) -> list[Document]:
    """The documents of a checked ``source``."""
    return TEXTS[source].load() if source in TEXTS else load_documents(source)


def joined(source: str) -> str:
    """A perplexity text as one string: all rows, empty ones too, with a blank line between them."""
    documents = load_text(source)
    if not all(isinstance(document, str) for document in documents):
        raise ValueError(f'perplexity is measured on plain text; {source} has rows of "messages"')
    return JOINED_BY.join(document for document in documents if isinstance(document, str))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids (T,) of a perplexity text, BOS as the tokenizer adds it; ``<unk>`` and the like in it are plain text.

    LLaMA's tokenizer would otherwise read PTB's ``<unk>`` as its own unknown token. Published PTB numbers of LLaMA
    differ several-fold by this (github.com/xvyaward/owq, issue 1: 56.0, and 12.5 without special tokens in text).
    """
    return torch.tensor(tokenizer(text, split_special_tokens=True, verbose=False).input_ids, dtype=torch.long)


def identity(source: str) -> str:
    """What a result must have been measured on to be comparable: the source, or a file's name and content."""
    if source in TEXTS or source.startswith("hub:"):
        return source
    return f"{Path(source).name} sha256:{hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]}"


def describe(source: str) -> str:
    return TEXTS[source].about if source in TEXTS else source
