"""The whole pipeline by one call."""

import pytest
import torch

import saap
from tests.saap.tiny import tiny_model, tiny_tokenizer

TEXT = ["the quick brown fox jumps over lazy dogs. " * 4] * 3
OPTIONS = {"samples": 4, "seq_len": 16, "multiple": 8}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "opt"])
def test_prune_calibrates_cuts_and_evaluates(family: str) -> None:
    model = tiny_model(family, torch.float32)
    result = saap.prune(model, tiny_tokenizer(), TEXT, ratio=0.2, eval_text=TEXT, **OPTIONS)
    assert result.model is model and result.plan.ratio >= 0.2 and result.statistics.sequences == 4
    assert result.evaluation is not None and result.evaluation.against is not None
    before, after = result.evaluation.against.parameters, result.evaluation.parameters
    assert before - after == result.plan.removed_parameters


def test_statistics_can_be_reused_for_another_criterion_and_uniform_sizes() -> None:
    statistics = saap.prune(tiny_model("llama", torch.float32), tiny_tokenizer(), TEXT, ratio=0.1, **OPTIONS).statistics
    model = tiny_model("llama", torch.float32)
    result = saap.prune(model, ratio=0.3, statistics=statistics, criterion="element", uniform=True, multiple=8)
    assert result.plan.uniform and result.evaluation is None
    assert len(set(saap.discover(model).layers)) == 1
    with pytest.raises(ValueError, match="these statistics belong to a llama model"):
        saap.prune(tiny_model("llama", torch.float32, seed=3), ratio=0.3, statistics=statistics)


def test_unreachable_ratios_are_refused_before_calibration() -> None:
    model = tiny_model("llama", torch.float32)
    with pytest.raises(ValueError, match="largest reachable ratio"):
        saap.prune(model, tiny_tokenizer(), TEXT, ratio=0.95, progress=lambda *_: pytest.fail("calibrated"), **OPTIONS)
    with pytest.raises(ValueError, match="expected calibration or evaluation text, got none"):
        saap.prune(model, tiny_tokenizer(), ratio=0.2, **OPTIONS)
