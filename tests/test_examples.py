"""Every example runs as its docstring says and prints what it promises."""

import subprocess
import sys
from pathlib import Path

import torch

import saap
from tests.saap.test_calibrate import measure, token_ids
from tests.saap.tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_llm_pruner_taylor_runs_and_ranks_every_layer(tmp_path) -> None:
    saap.save(tiny_model("llama", torch.float32), tmp_path / "model", tokenizer=tiny_tokenizer())
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over lazy dogs. " * 60)
    command = [sys.executable, EXAMPLES / "llm_pruner_taylor.py", tmp_path / "model", tmp_path / "text.txt"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "layer 2 mlp: first to go" in done.stdout and "of 97" in done.stdout


def test_llm_pruner_taylor_is_the_calibrated_mixed_importance(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from llm_pruner_taylor import importance_of

    ids = token_ids(4)
    found = importance_of(tiny_model("llama"), ids)
    want = measure(tiny_model("llama"), [ids]).modules["mlp"]
    mixed = want.salience.element_mean[2, want.rows.index("sum")]
    torch.testing.assert_close(torch.cat(found["mlp"]), mixed, rtol=1e-5, atol=0)  # transformers' loss is fp32
