"""Text to train on: documents joined into sequences of one length, and what of them the loss counts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.data import Document, check_tokenizer, data_fingerprint, encode, load_documents

IGNORED = -100  # a label that the loss leaves out


@dataclass(frozen=True)
class TrainingText(Dataset[dict[str, Tensor]]):
    """Packed sequences: ``input_ids`` and ``labels`` (sequences, seq_len) int64, labels -100 where no loss counts."""

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    @property
    def fingerprint(self) -> str:
        """A short hash of ids and labels."""
        return data_fingerprint(torch.stack([self.input_ids, self.labels]))


def pack_to_train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: Any, *, seq_len: int, seed: int = 0,
    most_tokens: int | None = None,
) -> TrainingText:  # fmt: skip
    """Documents in an order drawn from ``seed``, joined and cut into sequences of ``seq_len``; the tail is dropped.

    Plain text counts whole. Of chats, rows with "messages", only what the assistant answers counts, with the token
    that ends an answer; a chat template must render a conversation as a beginning of every longer one. Text behind
    ``most_tokens`` is not read. Raises ValueError for text without one full sequence, without anything that counts,
    and for a tokenizer or ids that do not fit the model.
    """
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    documents = load_documents(data)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    if isinstance(data, Tensor):
        order = list(range(len(documents)))
    pieces: list[tuple[Tensor, Tensor]] = []
    found = 0
    for index in order:
        if most_tokens is not None and found >= max(most_tokens, seq_len):
            break
        pieces.append(_with_labels(tokenizer, documents[index]))
        found += len(pieces[-1][0])
    sequences = found // seq_len
    if not sequences:
        raise ValueError(f"expected text of at least one sequence of {seq_len} tokens, found {found} tokens in all")
    ids, labels = (
        torch.cat(parts)[: sequences * seq_len].view(sequences, seq_len) for parts in zip(*pieces, strict=True)
    )
    if int(ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"expected token ids below the vocabulary size {model.config.vocab_size}, got {int(ids.max())}"
        )
    counted = (labels[:, 1:] != IGNORED).any(1)
    if not bool(counted.any()):
        raise ValueError("expected text that the loss counts, found chats without an answer of the assistant only")
    return TrainingText(ids[counted], labels[counted])


def _with_labels(tokenizer: PreTrainedTokenizerBase | None, document: Document) -> tuple[Tensor, Tensor]:
    ids = encode(tokenizer, document)
    if not isinstance(document, list):
        return ids, ids
    assert tokenizer is not None  # encode has refused chats without one
    labels = torch.full_like(ids, IGNORED)
    for turn, message in enumerate(document):
        if message.get("role") == "assistant":
            start = _rendered(tokenizer, document[:turn], ids, turn, answers=True)
            stop = _rendered(tokenizer, document[: turn + 1], ids, turn, answers=False)
            labels[start:stop] = ids[start:stop]
    return ids, labels


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], whole: Tensor, turn: int, answers: bool
) -> int:
    """How many tokens of the ``whole`` chat its first messages are, with the head of an answer if it ``answers``."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=answers)
    if ids != whole[: len(ids)].tolist():
        raise ValueError(
            f"expected a chat template that renders the first messages of a chat as its beginning, which that of this "
            f"tokenizer does not for message {turn}: {messages[-1:]!r:.80}"
        )
    return len(ids)
