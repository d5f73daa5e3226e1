"""Text to train on: documents joined into sequences of one length, and what of them the loss counts."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.data import Document, check_ids, check_tokenizer, data_fingerprint, encode, load_documents

IGNORED = -100  # a label that the loss leaves out
MARK = "\u2060answer\u2060"  # stands for an answer to find it by: no text begins or ends like it

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class TrainingText(Dataset[dict[str, Tensor]]):
    """Packed sequences: ``input_ids`` and ``labels`` (sequences, seq_len) int64, labels -100 where no loss counts.

    Nothing predicts the first label of a sequence, whatever it is.
    """

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

    Packed as GPT models are trained: a sequence may hold the end of one document and the start of another, and attends
    across them. Plain text counts whole. Of chats, rows with "messages", only what the assistant answers counts, with
    the token that ends an answer, wherever the chat template puts it. Text behind ``most_tokens`` is not read, and
    sequences in which nothing counts are left out. Raises ValueError for text without one full sequence, without
    anything that counts, for chats whose answers cannot be told apart in what the template makes of them, and for a
    tokenizer or ids that do not fit the model.
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
        pieces.append(_with_labels(tokenizer, documents[index], index))
        found += len(pieces[-1][0])
    sequences = min(found, max(most_tokens or found, seq_len)) // seq_len
    if not sequences:
        raise ValueError(
            f"expected text of at least one sequence of {seq_len} tokens, found {found} tokens in all; "
            "give more text or a shorter seq_len"
        )
    ids, labels = (
        torch.cat(parts)[: sequences * seq_len].view(sequences, seq_len) for parts in zip(*pieces, strict=True)
    )
    check_ids(model, ids)
    labels[:, 0] = IGNORED  # so that counting labels counts predictions
    counted = (labels != IGNORED).any(1)
    if not bool(counted.any()):
        raise ValueError("expected text that the loss counts, found chats without an answer of the assistant only")
    return TrainingText(ids[counted], labels[counted])


def _with_labels(tokenizer: PreTrainedTokenizerBase | None, document: Document, index: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (T,) of one document, the ``index``-th."""
    if not isinstance(document, list):
        ids = encode(tokenizer, document)
        return ids, ids.clone()
    for number, message in enumerate(document):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"chat {index}: expected message {number} as a dict with a role, got {message!r:.80}")
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        encode(tokenizer, document)  # says what is missing
    assert tokenizer is not None
    if not tokenizer.is_fast:
        raise ValueError("expected a fast tokenizer for chats: a slow one cannot say where in the text a token is")
    text = _rendered(tokenizer, document, index)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(encoded.input_ids, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    special = _special_ids(tokenizer)
    for turn, message in enumerate(document):
        if message["role"] == "assistant":
            start, stop = _answer(tokenizer, document, turn, text, index)
            inside = [at for at, (a, b) in enumerate(encoded.offset_mapping) if a < stop and b > start]
            ends = [at for at in inside if encoded.input_ids[at] in special]
            if ends and not text[encoded.offset_mapping[ends[-1]][1] : stop].strip():
                # what templates put behind the token that ends an answer is nothing that the model says
                inside = inside[: inside.index(ends[-1]) + 1]
            labels[inside] = ids[inside]
    return ids, labels


def _answer(tokenizer: PreTrainedTokenizerBase, chat: Messages, turn: int, text: str, index: int) -> tuple[int, int]:
    """Where in the ``text`` of a whole chat the answer at ``turn`` is, with what ends it: first and last character + 1.

    Most templates render the first messages of a chat as its beginning. Others render a message by what comes behind
    it (Qwen 3 drops thoughts before the last question): there the answer is what changes when another takes its place.
    """
    prompt = _rendered(tokenizer, chat[:turn], index, answers=True) if turn else None
    through = _rendered(tokenizer, chat[: turn + 1], index)
    if prompt is not None and through.startswith(prompt) and text.startswith(through):
        return len(prompt), len(through)
    marked = {**chat[turn], "content": MARK}
    other = _rendered(tokenizer, [*chat[:turn], marked, *chat[turn + 1 :]], index)
    alone = _rendered(tokenizer, [*chat[:turn], marked], index)
    in_order = not turn or alone.startswith(_rendered(tokenizer, chat[:turn], index))
    found = None
    if in_order and not chat[turn].get("tool_calls") and other.count(MARK) == alone.count(MARK) == 1:
        before, after = other.split(MARK)
        found = _between(text, before, after, prompt)
    if found is None:
        raise ValueError(
            f"chat {index}: expected a chat template that shows where the answer in message {turn} is: one that "
            f"renders messages in their order, and every answer once; the message is {chat[turn].get('content')!r:.80}"
        )
    ending = alone.split(MARK)[1]
    return found[0], found[1] + (len(ending) if text.startswith(ending, found[1]) else 0)


def _between(text: str, before: str, after: str, prompt: str | None) -> tuple[int, int] | None:
    """What of ``text`` is between the two, or behind the ``prompt`` that the first begins with; None if it is not."""
    stop = len(text) - len(after)
    if not text.endswith(after):
        return None
    for start in (prompt, before):
        if start is not None and before.startswith(start) and text.startswith(start) and len(start) <= stop:
            return len(start), stop
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Messages, index: int, answers: bool = False) -> str:
    """The text of a chat, with the head of an answer behind it if one ``answers``."""
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answers)
    except (TemplateError, TypeError, KeyError) as error:  # templates refuse roles and orders of them
        raise ValueError(f"chat {index}: the chat template refuses it: {error}") from error
    return str(text)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
