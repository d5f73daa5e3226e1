"""The seven zero-shot tasks on local rows: lm_eval's scores against likelihoods computed here."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import SMALL_MODEL
from benchmarks.zero_shot import TASKS, zero_shot

LOCAL_TASKS = Path(__file__).parents[1] / "benchmarks" / "local_tasks"


def requests_of(task: str) -> list[tuple[list[str], list[str], int]]:
    """(contexts, answers, right answer) of each local row, by the published prompt of the task."""
    rows = [json.loads(line) for line in (LOCAL_TASKS / f"{task}.jsonl").read_text().splitlines()]
    if task == "boolq":
        prompts = [f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:" for row in rows]
        return [([prompt] * 2, ["no", "yes"], row["label"]) for prompt, row in zip(prompts, rows, strict=True)]
    if task == "winogrande":  # partial evaluation: the same end after either filling
        halves = [row["sentence"].split("_") for row in rows]
        return [
            ([start + row["option1"], start + row["option2"]], [end.strip()] * 2, int(row["answer"]) - 1)
            for (start, end), row in zip(halves, rows, strict=True)
        ]
    if task == "piqa":
        prompts = [f"Question: {row['goal']}\nAnswer:" for row in rows]
        return [([p] * 2, [row["sol1"], row["sol2"]], row["label"]) for p, row in zip(prompts, rows, strict=True)]
    if task == "hellaswag":
        prompts = [f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}" for row in rows]
        return [([p] * 4, row["endings"], int(row["label"])) for p, row in zip(prompts, rows, strict=True)]
    prompts = [row.get("question_stem") or f"Question: {row['question']}\nAnswer:" for row in rows]
    right = [row["choices"]["label"].index(row["answerKey"]) for row in rows]
    answers = [row["choices"]["text"] for row in rows]
    return [([p] * len(a), a, r) for p, a, r in zip(prompts, answers, right, strict=True)]


def likelihood(model, tokenizer, context: str, answer: str) -> float:
    """Log-probability of the answer's tokens after the context, BOS in front."""
    start, whole = (tokenizer(text, return_tensors="pt").input_ids[0] for text in (context, f"{context} {answer}"))
    with torch.no_grad():
        logits = model(input_ids=whole[None, :-1]).logits[0].double()
    return -float(F.cross_entropy(logits[len(start) - 1 :], whole[len(start) :], reduction="sum"))


def test_all_seven_task_formats_score_as_defined(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SMALL_MODEL), AutoTokenizer.from_pretrained(SMALL_MODEL)
    found = zero_shot(model, tokenizer, tuple(TASKS), folder=LOCAL_TASKS)
    options = set()
    for task, numbers in found.items():
        plain = normalised = 0
        for contexts, answers, right in requests_of(task):
            scores = [likelihood(model, tokenizer, *pair) for pair in zip(contexts, answers, strict=True)]
            per_character = [score / len(answer) for score, answer in zip(scores, answers, strict=True)]
            plain += scores.index(max(scores)) == right
            normalised += per_character.index(max(per_character)) == right
            options.add(len(answers))
        assert (numbers["rows"], numbers["acc"]) == (6, pytest.approx(plain / 6))
        assert TASKS[task][1] == ("acc_norm" if "acc_norm" in numbers else "acc")
        if "acc_norm" in numbers:
            assert numbers["acc_norm"] == pytest.approx(normalised / 6)
    assert options == {2, 3, 4, 5}
