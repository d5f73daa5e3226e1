"""What a recovery is asked for, checked before anything is loaded, and compared when one is resumed."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

from saap.quantiser import ROUNDINGS, check_bits

METHODS = ("groupwise", "lora", "full")
OBJECTIVES = ("auto", "distillation", "next_token")
LEARNING_RATES = {"groupwise": 1e-2, "lora": 1e-2, "full": 1e-3}  # of a model whose hidden states are MEASURED wide
MEASURED = 256
HIDDEN = 16.0
USED_BY = {  # settings that some methods alone read
    "levels": ("groupwise",),
    "norms": ("groupwise",),
    "rank": ("groupwise", "lora"),
    "alpha": ("groupwise", "lora"),
}
QUANTISING, DISTILLING = ("group_size", "rounding"), ("top_k", "next_token", "hidden")


@dataclass(frozen=True)
class Settings:
    """How ``saap.recover`` tunes a model.

    ``method`` "groupwise" quantises the Linears of the decoder layers to ``bits`` in groups of ``group_size``, by
    ``rounding`` (``saap.quantise``), and learns low-rank changes of their zero points, and of their ``levels``, with
    ``rank`` and ``alpha``; with ``norms`` the weights of norms learn too. "lora" is LoRA through peft, on weights as
    they are (``bits`` None) or quantised; "full" trains every weight.
    ``objective`` "distillation" follows a dense teacher: over its ``top_k`` likeliest tokens (None: all), plus
    ``next_token`` times the next-token loss, plus ``hidden`` (None: ``HIDDEN``) times the distance of hidden states;
    "next_token" follows the text alone; "auto" is distillation where there is a teacher.
    Text is packed into sequences of ``seq_len``, ``batch_size`` of them a step in micro-batches of ``micro_batch``
    (None: all at once); training ends after ``epochs`` of it or ``tokens``, whichever is less (None: no limit by it).
    AdamW; the ``learning_rate`` (None: ``default_learning_rate``) rises over the share ``warmup`` of the steps and
    falls along a cosine. Held-out text is evaluated, and a checkpoint kept, every ``evaluate_every`` steps (None: ten
    times in all); after ``patience`` evaluations without a better one training stops (None: never), and the best is
    taken.
    Raises ValueError naming what was expected and what came.
    """

    method: str = "groupwise"
    bits: int | None = 4
    group_size: int = 32
    rounding: str = "gptq"
    rank: int = 16
    alpha: float = 16.0
    levels: bool = True
    norms: bool = True
    objective: str = "auto"
    top_k: int | None = 64
    next_token: float = 0.0
    hidden: float | None = None
    seq_len: int = 512
    batch_size: int = 8
    micro_batch: int | None = None
    epochs: float = 1.0
    tokens: int | None = None
    learning_rate: float | None = None
    warmup: float = 0.1
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    patience: int | None = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("objective", OBJECTIVES), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.method == "groupwise" and self.bits is None:
            raise ValueError("method groupwise tunes quantised weights: expected bits 8 or 4, got None (--bits 16)")
        if self.method == "full" and self.bits is not None:
            raise ValueError(f"method full trains plain weights: expected bits None (--bits 16), got {self.bits}")
        if self.bits is not None:
            check_bits(self.bits, self.group_size)
        for name in ("rank", "batch_size", "seq_len", "micro_batch", "tokens", "evaluate_every", "patience", "top_k"):
            value = getattr(self, name)
            if value is None and name not in ("rank", "batch_size", "seq_len"):
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed: expected an integer from 0 to 2^32 - 1, got {self.seed!r}")
        for name in ("alpha", "epochs", "learning_rate", "next_token", "hidden", "warmup"):
            value = getattr(self, name)
            if value is None and name in ("learning_rate", "hidden"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        for name in ("alpha", "epochs", "learning_rate"):
            value = getattr(self, name)
            if not (value is None and name == "learning_rate") and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        for name in ("next_token", "hidden"):
            if not 0 <= (getattr(self, name) or 0.0) < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share of the steps in [0, 1), got {self.warmup!r}")
        if self.batch_size % (self.micro_batch or self.batch_size):
            raise ValueError(f"micro_batch: expected a divisor of batch_size {self.batch_size}, got {self.micro_batch}")

    @property
    def hidden_weight(self) -> float:
        """Of the distance of hidden states; none where nothing is distilled."""
        if self.objective == "next_token":
            return 0.0
        return HIDDEN if self.hidden is None else self.hidden

    def rate(self, hidden_size: int) -> float:
        """The learning rate at its largest, of a model of that width."""
        return self.learning_rate or default_learning_rate(self.method, hidden_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def used(self) -> dict[str, Any]:
        """Those that the method, its bits and its objective read: what ``saap.recover`` may be given."""
        left = unused(self)
        return {name: value for name, value in self.to_dict().items() if name not in left}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Raises ValueError for settings that this version does not know."""
        unknown = sorted(set(values) - {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"unknown recovery settings: {', '.join(unknown)}")
        return cls(**values)


def unused(settings: Settings) -> dict[str, str]:
    """{name of a setting that is not read: what it belongs to, and what came}; objective "auto" may read all of its."""
    method = settings.method
    found = {
        name: f"method{'s' * (len(methods) > 1)} {' and '.join(methods)}, got method {method}"
        for name, methods in USED_BY.items()
        if method not in methods
    }
    if settings.bits is None:
        came = f"method {method}" + (" with bits None (--bits 16)" if method == "lora" else "")
        found |= dict.fromkeys(QUANTISING, f"bits 4 and 8 of methods groupwise and lora, got {came}")
    if settings.objective == "next_token":
        found |= dict.fromkeys(DISTILLING, "objective distillation, got objective next_token")
    return found


def asked_for(settings: dict[str, Any]) -> set[str]:
    """Names of the ``settings`` that ask for something: not None, no weight of 0 in the loss."""
    return {
        name
        for name, value in settings.items()
        if not (value is None or (name in ("next_token", "hidden") and value == 0))
    }


def refuse_unused(given: Collection[str], settings: Settings, has_teacher: bool, held_out: Any) -> None:
    """Raise ValueError naming each setting that was ``given`` and is not read, and what it belongs to."""
    found = unused(settings)
    if not has_teacher:
        found |= {name: f"{found[name]}: there is no teacher (--teacher)" for name in DISTILLING if name in found}
    if isinstance(held_out, int | float) and not held_out:
        found["patience"] = "trainings with held-out text (--held-out), got none"
    told = [f"{name} ({flag(name)}) belongs to {found[name]}" for name in found if name in given]
    if told:
        raise ValueError(f"settings that would be left unread: {'; '.join(told)}")


def refuse_rounding(given: Collection[str], quantised: Any) -> None:
    """Raise ValueError for a rounding of a model that is ``quantised`` already, as its configuration describes it."""
    if quantised and "rounding" in given:
        raise ValueError(
            "settings that would be left unread: rounding (--rounding) belongs to models of 16- or 32-bit weights, got "
            "one that is quantised, and tuned as it came"
        )


def flag(name: str) -> str:
    """The command's name of a setting."""
    return "--" + name.replace("_", "-")


def default_learning_rate(method: str, hidden_size: int) -> float:
    """The largest one of AdamW where none is given: ``LEARNING_RATES``, in proportion less for wider models.

    Rates of Adam fall with the width in that proportion in the maximal update parametrisation (Yang et al. 2022,
    arXiv 2203.03466, table 3); here they were measured at ``MEASURED`` alone.
    """
    return LEARNING_RATES[method] * min(1.0, MEASURED / hidden_size)
