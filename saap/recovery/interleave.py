"""Recovery between the steps of pruning: prune a little, tune a little, with one budget of tokens."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.micro_batches import Progress, fit_micro_batches
from saap.recovery.recover import Told, check_models, settled, tune
from saap.recovery.settings import Settings
from saap.recovery.training_text import TrainingText, pack_to_train
from saap.stream import Streaming, resolve_streaming
from saap.units import Units

BATCH = 8  # sequences per step of AdamW


def check_tokens(tokens: Any, steps: int, seq_len: int) -> None:
    """Raise ValueError unless ``tokens`` are a batch of sequences for every step; RuntimeError for missing packages."""
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"recover_tokens must be a positive integer; got {tokens!r}")
    least = steps * BATCH * seq_len
    if tokens < least:
        raise ValueError(
            f"recover_tokens: expected at least {least}, a batch of {BATCH} sequences of {seq_len} tokens after each "
            f"of {steps} steps; got {tokens}"
        )
    settled({"method": "lora"}, has_teacher=True)


def refuse_streaming(model: PreTrainedModel, stream: "bool | str | Streaming") -> None:
    """Raise ValueError for a model that is streamed: it cannot be tuned."""
    if resolve_streaming(model, stream) is not None:
        raise ValueError(
            "recover_tokens tunes the model in memory: expected one that is not streamed (--stream off); "
            "prune it streamed, then saap recover quantises and tunes it in less memory"
        )


@dataclass(frozen=True)
class Tuning:
    """How a pruned model is tuned after every step: LoRA on its weights as they are, merged, after the dense model.

    Each step has ``sequences`` of ``text`` of its own, from its start again where it is too short for all.
    """

    text: TrainingText
    sequences: int
    settings: Settings

    @classmethod
    def of(
        cls, model: PreTrainedModel, units: Units, tokenizer: PreTrainedTokenizerBase | None, data: Any, tokens: int,
        steps: int, calibration: dict[str, Any],
    ) -> "Tuning":  # fmt: skip
        """Of ``tokens`` of the calibration text in all; raises ValueError for what cannot be tuned."""
        seq_len, seed = calibration.get("seq_len", 512), calibration.get("seed", 0)
        refuse_streaming(model, calibration.get("stream", "auto"))
        fit = fit_micro_batches(
            units, BATCH, seq_len, model.dtype, model.device,
            batch_size=calibration.get("batch_size", "auto"), checkpoint=calibration.get("checkpoint", "auto"),
        )  # fmt: skip
        sequences, fits = tokens // steps // seq_len, max(1, fit.batch)
        chosen = {
            "method": "lora", "seq_len": seq_len, "batch_size": BATCH, "epochs": 1.0, "tokens": sequences * seq_len,
            "micro_batch": next(size for size in range(BATCH, 0, -1) if BATCH % size == 0 and size <= fits),
            "gradient_checkpointing": fit.recompute, "seed": seed,
        }  # fmt: skip
        settings = settled(chosen, has_teacher=True)
        check_models(model, None, settings)
        text = pack_to_train(model, tokenizer, data, seq_len=seq_len, seed=seed, most_tokens=tokens)
        return cls(text, sequences, settings)

    @property
    def described(self) -> dict[str, Any]:
        """What a plan's settings say of it, beside the tokens."""
        return {"recover_method": self.settings.method, "recover_objective": self.settings.objective}

    def after(
        self, step: int, model: PreTrainedModel, teacher: PreTrainedModel, progress: Progress | None
    ) -> PreTrainedModel:
        """``model`` tuned in place after a step, counted from 1."""
        rows = torch.arange((step - 1) * self.sequences, step * self.sequences) % len(self.text)
        text = TrainingText(self.text.input_ids[rows], self.text.labels[rows])
        with tempfile.TemporaryDirectory(prefix="saap-recover-") as folder:
            told = Told(progress)
            return tune(model, text, None, self.settings, teacher, folder, False, told, lasting=False).model
