"""What happened to a recovered model: rows for its card, and its report."""

from transformers import PreTrainedModel

from saap.card import comparisons
from saap.evaluate import Evaluation
from saap.plan import Plan
from saap.recovery.recover import Recovered
from saap.recovery.settings import Settings
from saap.report import environment, evaluation_facts, mlp_widths, now, shown_name
from saap.report_data import Fact, Losses, Report, Widths

OBJECTIVE = {"next_token": "next-token loss", "distillation": "KL divergence"}


def recovery_rows(found: Recovered, teacher: str | None) -> dict[str, str]:
    """{what: how} of a recovery, for a card and for people."""
    settings, history = found.settings, found.history
    text = f"{found.sequences:,} sequences of {settings.seq_len} tokens"
    text += f", {found.held_out:,} more held out" if found.held_out else ", none held out"
    rows = {"recovery": _method(settings), "training text": text}
    rows["tokens trained on"] = f"{history.tokens:,} in {len(history.losses):,} steps"
    if history.cut_short:
        rows["stopped"] = f"after step {len(history.losses):,} of {history.planned:,}, and finished from its checkpoint"
    if settings.bits is not None:
        rounded = f"rounded by {settings.rounding}" if "quantise" in found.timings else "as it came"
        stored = f"int{settings.bits} in groups of {settings.group_size}, {rounded}"
        merged = f"trained on {stored}, merged into {_dtype(found.model)} weights"
        rows["weights"] = stored if settings.method == "groupwise" else merged
    rows["objective"] = _objective(settings, teacher)
    evaluated = {each.step: each.loss for each in history.evaluations}
    if history.best in evaluated:
        rows["held-out loss"] = _held_out(evaluated, history.best, history.stopped_early)
    return rows


def _held_out(evaluated: dict[int, float], best: int, stopped_early: bool) -> str:
    """What came of training on other text, in next-token loss by step; step 0 is before it."""
    ended = ", stopped early" if stopped_early else ""
    if best == 0:
        return f"{evaluated[0]:.4f} before training, which no step made better: nothing learned was kept{ended}"
    before = f" ({evaluated[0]:.4f} before training)" if 0 in evaluated else ""
    return f"{evaluated[best]:.4f} after step {best}{before}, the best, which was taken{ended}"


def _method(settings: Settings) -> str:
    size = f"rank {settings.rank}, alpha {settings.alpha:g}"
    if settings.method != "groupwise":
        return {"lora": f"LoRA, {size}, merged", "full": "all weights"}[settings.method]
    learned = ["zero points", *(["levels"] if settings.levels else []), *(["norms"] if settings.norms else [])]
    return f"groupwise: {', '.join(learned)}, {size}, merged"


def _objective(settings: Settings, teacher: str | None) -> str:
    if settings.objective == "next_token":
        return "next token"
    tokens = "all tokens" if settings.top_k is None else f"its {settings.top_k} likeliest tokens"
    extra = [f"{value:g} x {name}" for name, value in (("next token", settings.next_token),
             ("hidden states", settings.hidden)) if value]  # fmt: skip
    return " + ".join([f"distillation from {teacher or 'the dense model'} over {tokens}", *extra])


def described_recovery(
    name: str, found: Recovered, plan: Plan | None, evaluation: Evaluation | None, timings: dict[str, float],
    files: dict[str, str],
) -> Report:  # fmt: skip
    """The report of one recovered model ``name``, evaluated against the pruned one; ``files`` by what they were for."""
    settings, history, model = found.settings, found.history, found.model
    rows = list(zip(("recovered", "pruned", "dense"), comparisons(evaluation), strict=False))[::-1]
    told = {key: value for key, value in settings.to_dict().items() if value is not None}
    told |= {"sequences": found.sequences, "held-out sequences": found.held_out, "tokens trained on": history.tokens}
    told |= {"steps": len(history.losses), "step taken": history.best, "stopped early": history.stopped_early}
    told |= {"steps planned": history.planned} if history.cut_short else {}
    sections = {"Recovery": told, "Plan": {} if plan is None else plan.settings}
    sections["Text and files"] = {key: shown_name(file) for key, file in files.items()}
    return Report(
        title=f"{name}, recovered",
        summary=". ".join(f"{key.capitalize()}: {value}" for key, value in recovery_rows(found, None).items()) + ".",
        names=("pruned", "recovered"),
        facts=_facts(model, evaluation),
        widths=[] if plan is None else _widths(plan),
        width_names=("dense", "pruned"),
        losses=Losses(
            OBJECTIVE[settings.objective],
            list(history.losses),
            [(each.step, each.loss) for each in history.evaluations],
            history.best,
        ),
        evaluations=[(row, {**each.to_dict(), "against": None}) for row, each in rows],
        settings=sections,
        timings=timings,
        environment=environment(model.device) | {"dtype": _dtype(model)},
        made=now(),
    )


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _widths(plan: Plan) -> list[Widths]:
    before, after = plan.units.layers, plan.layers
    heads = Widths("KV heads", [old.kv_heads for old in before], [len(new.kv_heads) for new in after])
    return [heads, *mlp_widths(before, [(new.width, len(new.experts)) for new in after])]


def _facts(model: PreTrainedModel, evaluation: Evaluation | None) -> list[Fact]:
    if evaluation is None or evaluation.against is None:
        return []
    return evaluation_facts(evaluation.against, evaluation)
