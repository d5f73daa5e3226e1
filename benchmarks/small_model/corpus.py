"""Split CPython's documentation into training, calibration, selection and report documents.

A document is one reStructuredText file. Every document belongs to exactly one split, chosen by
the hash of its path, so the splits never share a document and do not change between runs.
"""

import hashlib
import json
from pathlib import Path

HELD_OUT_CHARACTERS = {"calibration": 500_000, "selection": 150_000, "report": 200_000}
SHORTEST_DOCUMENT = 1_500
LONGEST_HELD_OUT_DOCUMENT = 40_000


def read_documents(source: Path) -> dict[str, str]:
    """Return {relative path: text} of every ``.rst`` or ``.rst.txt`` file below ``source``."""
    documents = {}
    for path in sorted([*source.rglob("*.rst"), *source.rglob("*.rst.txt")]):
        text = path.read_text(encoding="utf-8").strip()
        if len(text) >= SHORTEST_DOCUMENT:
            documents[path.relative_to(source).as_posix().removesuffix(".txt")] = text
    if not documents:
        raise ValueError(f"expected .rst or .rst.txt files below {source}, found none")
    return documents


def split_documents(documents: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return {split: {path: text}} for ``train`` and the held-out splits, disjoint by document."""
    order = sorted(documents, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    candidates = [path for path in order if len(documents[path]) <= LONGEST_HELD_OUT_DOCUMENT]
    splits: dict[str, dict[str, str]] = {}
    for split, wanted in HELD_OUT_CHARACTERS.items():
        chosen: dict[str, str] = {}
        while candidates and sum(map(len, chosen.values())) < wanted:
            path = candidates.pop(0)
            chosen[path] = documents[path]
        splits[split] = chosen
    held_out = {path for chosen in splits.values() for path in chosen}
    splits["train"] = {path: documents[path] for path in order if path not in held_out}
    return splits


def write_jsonl(path: Path, documents: dict[str, str]) -> None:
    """Write one ``{"source": ..., "text": ...}`` object per document."""
    with path.open("w", encoding="utf-8") as file:
        for source, text in documents.items():
            file.write(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
