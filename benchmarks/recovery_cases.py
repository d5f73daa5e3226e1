"""What the benchmark of recovery compares: ways to tune a pruned model on the same tokens, and what is asked."""

from dataclasses import dataclass, replace

from saap.recovery.settings import Settings

DISTILLED, NEXT = "distillation", "next_token"
TUNING = {  # of every case unless its name says otherwise; chosen on the selection text (docs/recovery.md)
    "seq_len": 512,
    "batch_size": 4,
    "epochs": 5.0,
    "patience": None,  # the last parameters count: no text is held out of so few tokens
}
HIDDEN = 16.0  # weight of the hidden states' distance, in distillation
QUANTISED = {"bits": 4, "group_size": 32}


@dataclass(frozen=True)
class Case:
    """One way to recover. ``settings`` None: no training. ``then``: how the tuned model is stored afterwards.

    ``then`` is "" (as it is), a rounding of ``saap.quantise`` (int4 in groups of 32), or "float16" (weights, scales
    and zero points of 16 bits). Cases of equal settings share one training.
    """

    name: str
    group: str
    settings: Settings | None
    then: str = ""


def _settings(method: str, objective: str, **others: object) -> Settings:
    bits = {} if method == "groupwise" else {"bits": None}
    hidden = HIDDEN if objective == DISTILLED else 0.0
    return Settings(**{"method": method, "objective": objective, "hidden": hidden, **bits, **TUNING, **others})  # type: ignore[arg-type]  # of the fields' own types


LORA = "LoRA r16, 16-bit"
LORA_NEXT = f"{LORA}, next token"
GROUPWISE = "group-wise int4"
GROUPWISE_NEXT = f"{GROUPWISE}, next token"
ONE_EPOCH = "one epoch"  # of the next token alone, which fits the text by heart after five
ROUNDINGS = {"nearest": "nearest", "clip": "clip search", "gptq": "GPTQ"}


def _then(lora: str, rounding: str) -> str:
    """The name of a case that quantises another after training."""
    return f"{lora}, then int4 by {ROUNDINGS[rounding]}"


def _main() -> list[Case]:
    """Both methods under both objectives, LoRA also quantised afterwards; most telling first."""
    found = []
    for lora, groupwise, objective in ((LORA, GROUPWISE, DISTILLED), (LORA_NEXT, GROUPWISE_NEXT, NEXT)):
        plain = _settings("lora", objective)
        found += [Case(lora, "main", plain)]
        found += [Case(_then(lora, rounding), "main", plain, rounding) for rounding in ROUNDINGS]
        found += [Case(groupwise, "main", _settings("groupwise", objective))]
    stored = replace(found[4], name=f"{GROUPWISE}, stored in 16 bits", then="float16")
    untuned = [Case(f"not tuned, int4 by {said}", "main", None, rounding) for rounding, said in ROUNDINGS.items()]
    return [*found[:5], stored, *untuned, *found[5:]]


def _others() -> list[Case]:
    """Other baselines, and group-wise tuning with one thing changed; all but the first two by distillation."""
    changed: dict[str, dict[str, object]] = {
        "zero points only (QA-LoRA)": {"levels": False},
        "norms frozen": {"norms": False},
        "base by nearest": {"rounding": "nearest"},
        "rank 8": {"rank": 8},
        "rank 32": {"rank": 32},
        "groups of 64": {"group_size": 64},
        "groups of 128": {"group_size": 128},
    }
    return [
        Case(f"{LORA_NEXT}, {ONE_EPOCH}", "others", _settings("lora", NEXT, epochs=1.0)),
        Case(f"{GROUPWISE_NEXT}, {ONE_EPOCH}", "others", _settings("groupwise", NEXT, epochs=1.0)),
        Case("group-wise int8", "others", _settings("groupwise", DISTILLED, bits=8)),
        Case("LoRA r16 on frozen int4, merged in 16 bits", "others", _settings("lora", DISTILLED, bits=4)),
        Case("every weight, 16-bit", "others", _settings("full", DISTILLED)),
        *(
            Case(f"{GROUPWISE}, {name}", "choices", _settings("groupwise", DISTILLED, **options))
            for name, options in changed.items()
        ),
    ]


CASES = (*_main(), *_others())
GROUPS = ("main", "others", "choices")


@dataclass(frozen=True)
class Asked:
    """A bound on the ratio of the perplexities of two cases."""

    ours: str
    peer: str
    bound: str


ASKED = (
    Asked(GROUPWISE, LORA, "<= 1.03"),
    *(Asked(GROUPWISE, _then(LORA, rounding), "< 1") for rounding in ROUNDINGS),
    Asked(GROUPWISE_NEXT, LORA_NEXT, "<= 1.03"),
    *(Asked(GROUPWISE_NEXT, _then(LORA_NEXT, rounding), "< 1") for rounding in ROUNDINGS),
    Asked(LORA, LORA_NEXT, "< 1"),
    Asked(GROUPWISE, GROUPWISE_NEXT, "< 1"),
    Asked(LORA, f"{LORA_NEXT}, {ONE_EPOCH}", "< 1"),
    Asked(GROUPWISE, f"{GROUPWISE_NEXT}, {ONE_EPOCH}", "< 1"),
)
RECOVERED = {(name, 0.5): ">= 0.6" for name in (LORA, GROUPWISE)}  # share of the lost log-perplexity, by case and ratio
BYTES = "<= 0.32"  # of the Linears of GROUPWISE, over those of the pruned model in 16 bits
