"""What of the text is trained on, and what is held out to be evaluated."""

import math
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.recovery.settings import Settings
from saap.recovery.training_text import TrainingText, pack_to_train

SHARE, FEWEST, MOST = 0.05, 16, 4  # held out by default: of the sequences, at least so many, of every so many one
HELD_OUT = f"{SHARE:.0%} of the sequences, but at least {FEWEST}, or a quarter where that is less"


def texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, data: Any, held_out: Any, settings: Settings
) -> tuple[TrainingText, TrainingText | None]:
    """What is trained on and what is evaluated, packed; errors as ``saap.recover``, and None for ``HELD_OUT``."""
    share = None
    if isinstance(held_out, (int, float)):
        share = float(held_out)
        if not 0 <= share < 1:
            raise ValueError(f"held_out: expected text, or a share of the sequences in [0, 1); got {held_out!r}")
    other = held_out is not None and share is None
    options = {"seq_len": settings.seq_len, "seed": settings.seed}
    most = _tokens_to_read(settings, 0.0 if other else share)
    text = pack_to_train(model, tokenizer, data, **options, most_tokens=most)
    if other:
        try:
            return text, pack_to_train(model, tokenizer, held_out, **options)
        except ValueError as error:
            raise ValueError(f"held-out text: {error}") from error
    kept = default_held_out(len(text)) if share is None else round(share * len(text))
    trained = len(text) - kept
    if share is None and settings.tokens is not None:  # more was read, so that enough can be held out
        trained = min(trained, math.ceil(settings.tokens / settings.seq_len))
    if kept == len(text):
        raise ValueError(f"held_out: expected a share that leaves sequences to train on, {share} takes all {kept}")
    if not kept:
        return _part(text, slice(trained)), None
    return _part(text, slice(trained)), _part(text, slice(-kept, None))


def default_held_out(sequences: int) -> int:
    """How many are held out where nobody says."""
    return max(round(SHARE * sequences), min(FEWEST, sequences // MOST))


def few_held_out(kept: TrainingText | None, held_out: Any) -> str | None:
    """What to warn of where early stopping goes by few sequences, or by none although some were to be ``held_out``."""
    found = 0 if kept is None else len(kept)
    wanted_none = isinstance(held_out, int | float) and not held_out
    if found >= FEWEST or wanted_none:
        return None
    came = f"{found} sequence{'s are' if found > 1 else ' is'}" if found else "no sequence is"
    taken = "which step is taken, and when training stops, goes by noise" if found else "the last step is taken"
    return f"{came} held out, fewer than {FEWEST}: {taken}; give more text, or held_out (--held-out) text of its own"


def _tokens_to_read(settings: Settings, share: float | None) -> int | None:
    """Those to train on and, behind them, those of the ``share`` to hold out; None for all that there are."""
    tokens = settings.tokens
    if tokens is None:
        return None
    if share is None:
        fewest = FEWEST * settings.seq_len
        return int(max(tokens / (1 - SHARE), tokens + fewest, MOST * fewest)) + settings.seq_len
    return int(tokens / (1 - share)) + settings.seq_len


def _part(text: TrainingText, which: slice) -> TrainingText:
    return TrainingText(text.input_ids[which], text.labels[which])
