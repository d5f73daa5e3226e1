"""Tiny models and texts to train, in tests and in the processes that they start."""

import torch

from saap.recovery.settings import Settings
from saap.recovery.training_text import TrainingText
from tests.saap.tiny import tiny_model

SEQ_LEN = 12


def learner(family: str = "llama", seed: int = 0, **overrides):
    """A tiny model whose norms and one Linear learn."""
    model = tiny_model(family, dtype=torch.float32, seed=seed, num_hidden_layers=2, **overrides)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "0.mlp.down_proj.weight" in name)
    return model


def some_text(sequences: int = 20, seed: int = 0, gaps: bool = True) -> TrainingText:
    """Arithmetic progressions, which can be learnt; some labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 64, (sequences, 1), generator=generator)
    ids = (start + 3 * torch.arange(SEQ_LEN)) % 64
    labels = ids.clone()
    if gaps:
        labels[torch.rand(ids.shape, generator=generator) < 0.3] = -100
        labels[:, 1] = ids[:, 1]
    return TrainingText(ids, labels)


def some_settings(**changes) -> Settings:
    values = {
        "method": "full", "bits": None, "seq_len": SEQ_LEN, "batch_size": 4, "learning_rate": 1e-2,
        "epochs": 2.4, "evaluate_every": 4, "warmup": 0.2, "hidden": 0.0,
    }  # fmt: skip
    return Settings(**(values | changes))
