"""Text in, packed token ids out: files, hub data sets, and iterables of str, dict or tensor."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Document = str | list[dict[str, str]] | Tensor  # plain text, chat messages, or token ids

FORMS = """text can be
  a .txt file: documents separated by blank lines
  a .jsonl file: one {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]} per line
  hub:name[:config]: the train split of a data set on the hub (pip install "saap[data]")
  in Python also an iterable of str, of such dicts, or of integer tensors"""


def load_documents(data: Any) -> list[Document]:
    """Read documents from any of the forms listed in ``FORMS``.

    Raises ValueError naming the file and line of a bad row, FileNotFoundError for a missing file.
    """
    if data is None:
        raise ValueError(f"expected calibration or evaluation text, got none; {FORMS}")
    if isinstance(data, (str, os.PathLike)):
        documents = _load_named(os.fspath(data))
    elif isinstance(data, Tensor):
        documents = [_check_ids(row, "data") for row in (data if data.ndim == 2 else data[None])]
    elif isinstance(data, Iterable):
        documents = [_document(row, f"data[{index}]") for index, row in enumerate(data)]
    else:
        raise ValueError(f"cannot read text from {type(data).__name__}; {FORMS}")
    if not documents:
        raise ValueError(f"found no document in {data!r}; {FORMS}")
    return documents


def _load_named(name: str) -> list[Document]:
    if name.startswith("hub:"):
        return _load_hub(name)
    path = Path(name)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"cannot read text from {name!r}; {FORMS}")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {name}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [block.strip() for block in text.replace("\r\n", "\n").split("\n\n") if block.strip()]
    documents: list[Document] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}:{number}: not valid JSON: {error}") from error
        documents.append(_document(row, f"{name}:{number}"))
    return documents


def _load_hub(name: str) -> list[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f'{name} needs the datasets library: pip install "saap[data]"') from error
    _, repository, *config = name.split(":")
    try:
        rows = datasets.load_dataset(repository, *config, split="train")
    except (OSError, ValueError) as error:  # offline, unknown or gated: the library's message says which
        raise ValueError(f"cannot load {name}: {error}\nwithout the hub, {FORMS}") from error
    return [_document(row, f"{name} row {index}") for index, row in enumerate(rows)]


def _document(row: Any, where: str) -> Document:
    if isinstance(row, Tensor):
        return _check_ids(row, where)
    if isinstance(row, str):
        return row
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return row["messages"]
    raise ValueError(f'{where}: expected a string, {{"text": ...}}, {{"messages": ...}} or token ids, got {row!r:.80}')


def _check_ids(ids: Tensor, where: str) -> Tensor:
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{where}: expected 1-D integer token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.long().cpu()  # packing and fingerprints happen there, wherever the caller's ids are


def encode(tokenizer: PreTrainedTokenizerBase | None, document: Document) -> Tensor:
    """Token ids (T,) of one document, with the special tokens the tokenizer itself adds."""
    if isinstance(document, Tensor):
        return document
    if tokenizer is None:
        raise ValueError("expected a tokenizer for text, got none; pass one or give token ids")
    if isinstance(document, str):
        return torch.tensor(tokenizer(document, verbose=False).input_ids, dtype=torch.long)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError('expected a tokenizer with a chat template for rows with "messages", got one without')
    ids = tokenizer.apply_chat_template(document, tokenize=True, return_dict=False)
    return torch.tensor(ids, dtype=torch.long)


def pack(tokenizer: PreTrainedTokenizerBase | None, data: Any, *, samples: int, seq_len: int, seed: int = 0) -> Tensor:
    """Documents in an order drawn from ``seed``, joined and cut into (samples, seq_len) int64 token ids.

    Documents are tokenised until there are enough tokens; the tail is dropped. A tensor of token
    ids keeps its order. Raises ValueError naming the tokens needed and found when there are too few.
    """
    documents = load_documents(data)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    if isinstance(data, Tensor):
        order = list(range(len(documents)))
    needed, found = samples * seq_len, 0
    pieces: list[Tensor] = []
    for index in order:
        if found >= needed:
            break
        pieces.append(encode(tokenizer, documents[index]))
        found += len(pieces[-1])
    if found < needed:
        raise ValueError(
            f"too little calibration text: {samples} samples of {seq_len} tokens need {needed} tokens, found {found}; "
            "give more text, fewer samples or a shorter seq_len"
        )
    return torch.cat(pieces)[:needed].view(samples, seq_len)


def pack_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
) -> Tensor:
    """As ``pack``; raises ValueError when ``model`` has no embedding for an id that occurs, or could."""
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    ids = pack(tokenizer, data, samples=samples, seq_len=seq_len, seed=seed)
    check_ids(model, ids)
    return ids


def check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise ValueError for token ids that ``model`` has no embedding for: a GPU's kernels would end the process."""
    size = model.config.vocab_size
    if int(ids.max()) >= size:
        raise ValueError(f"expected token ids below the vocabulary size {size}, got {int(ids.max())}")
    if int(ids.min()) < 0:
        raise ValueError(f"expected token ids from 0 on, got {int(ids.min())}; leave out what pads a sequence")


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError when the tokenizer can produce ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer does not belong to this model: it has {len(tokenizer)} tokens, the model {rows} embeddings"
        )


def data_fingerprint(ids: Tensor) -> str:
    """A short hash of packed token ids."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()[:16]
