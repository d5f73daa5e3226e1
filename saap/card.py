"""The model card that goes with a pruned checkpoint, ready for the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from saap.evaluate import Evaluation
from saap.plan import Plan
from saap.quantised_config import in_words
from saap.serving.gguf_architecture import refuse_misaligned
from saap.serving.gguf_metadata import form_of
from saap.stored_weight import METHOD
from saap.units import Units

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_DATA = "hub:"
HERE = "THIS_DIRECTORY"
GGUF_TYPE = "q8_0"
CARD_FILE = "README.md"
MAKING = "## How it was made"
TUNED_ON, RECOVERY, ROUNDING, PLAN, KEPT = "tuned on", "recovery", "rounding of weights", "plan", "kept units"


@dataclass(frozen=True)
class Made:
    """What the card tells of how a model came to be; of paths it tells the last part alone.

    ``base`` and ``data`` are what the dense model and the calibration text were loaded by, ``measured`` says how much
    of the text was read, ``rounding`` how weights were quantised, ``command`` is the command line; ``evaluation`` is
    on the text ``evaluated_on``, and so are those that it is ``against``. ``recovery`` are (name, value) of how the
    model was tuned, if it was: a calibration text is then what it was tuned on.
    """

    base: str = ""
    data: str | None = None
    measured: str = ""
    command: str = ""
    evaluation: Evaluation | None = None
    evaluated_on: str | None = None
    rounding: str = ""
    recovery: tuple[tuple[str, str], ...] = ()

    @property
    def rows(self) -> list[tuple[str, Evaluation]]:
        """(name, Evaluation) of the dense model, the pruned one and the recovered one, as far as they were measured."""
        names = ("recovered", "pruned", "dense") if self.recovery else ("pruned", "dense")
        return list(zip(names, comparisons(self.evaluation), strict=False))[::-1]


def comparisons(evaluation: Evaluation | None) -> list[Evaluation]:
    """An evaluation, the one that it is against, the one that this is against, and so on."""
    return [] if evaluation is None else [evaluation, *comparisons(evaluation.against)]


def hub_name(name: str) -> str | None:
    """``name`` if it is a repository of the hub rather than a path on this machine."""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def told_name(name: str) -> str:
    """A hub name whole, and of a path the last part: cards travel."""
    return name if name.startswith(HUB_DATA) or hub_name(name) else Path(name).name


def model_card(model: PreTrainedModel, units: Units, plan: Plan | None, version: str, made: Made | None = None) -> str:
    """Markdown with the hub's metadata, sizes, how the model was made, and the lines that load and serve it."""
    made = made or Made()
    tuned, name = bool(made.recovery), told_name(made.base) or units.family
    title = f"Recovered {name}" if tuned else f"Pruned {name}"
    whole = tuned and plan is None and not _of_template(model)  # as far as anybody knows
    tags = ["saap"] if whole else ["pruned", "saap"]
    parts = [
        f"---\n{_metadata(title, made, tags)}\n# license: left to you; that of the base model holds on\n---",
        f"# {title}",
        _what(tuned, whole, version),
        _table(_sizes(model, units, plan)),
        *_making(plan, made),
        *_measured(made),
        "## Load it",
        _loading(model),
        "## Serve it",
        _serving(model, units),
    ]
    return "\n\n".join(parts) + "\n"


def _what(tuned: bool, whole: bool, version: str) -> str:
    """The first sentence of a model that is ``whole`` unless it was pruned."""
    if whole:
        return f"A causal language model that was tuned on text with SAAP {version}."
    return (
        "A structurally pruned causal language model: whole KV groups, MLP channels or experts were removed with SAAP "
        f"{version}{', and what is left was tuned on text' if tuned else ''}."
    )


def _of_template(model: PreTrainedModel) -> bool:
    return type(model).__name__.startswith("Saap")


def _metadata(title: str, made: Made, tags: list[str]) -> str:
    """The YAML that the hub reads."""
    values: dict[str, Any] = {"tags": tags, "pipeline_tag": "text-generation"}
    values |= {"library_name": "transformers", "base_model": hub_name(made.base)}
    if made.data is not None and made.data.startswith(HUB_DATA):
        values["datasets"] = [made.data.removeprefix(HUB_DATA).partition(":")[0]]
    if made.evaluation is not None and made.evaluated_on is not None:
        text = told_name(made.evaluated_on)
        values["model_name"] = title
        values["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type=text.removeprefix(HUB_DATA).partition(":")[0],
                dataset_name=text.removeprefix(HUB_DATA),
                metric_type="perplexity",
                metric_value=round(made.evaluation.perplexity, 4),
                metric_name=f"perplexity in windows of {made.evaluation.seq_len} tokens",
            )
        ]
    return ModelCardData(**values).to_yaml()


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _sizes(model: PreTrainedModel, units: Units, plan: Plan | None) -> list[tuple[str, str]]:
    def of_layers(name: str) -> str:
        return ", ".join(str(getattr(layer, name)) for layer in units.layers)

    mixture = any(layer.experts for layer in units.layers)
    rows = [("parameters", f"{units.total_parameters:,}")]
    if plan is not None:
        rows.append(("removed", f"{plan.ratio:.2%} of all parameters, {plan.block_ratio:.2%} of the blocks'"))
    rows += [("layers", str(len(units.layers))), ("KV heads per layer", of_layers("kv_heads"))]
    rows += [("experts per layer", of_layers("experts"))] if mixture else []
    width = "width of each expert per layer" if mixture else "MLP width per layer"
    rows += [(width, of_layers("intermediate_size")), ("class", type(model).__name__)]
    described = _quantisation(model)
    if described:
        dtype = str(model.dtype).removeprefix("torch.")
        rows.append(("weights of the decoder layers", f"{in_words(described)}; the others {dtype}"))
    return rows


def _quantisation(model: PreTrainedModel) -> dict[str, Any]:
    return dict(getattr(model.config, "quantization_config", None) or {})


def _making(plan: Plan | None, made: Made) -> list[str]:
    rows = [] if hub_name(made.base) is None else [("base model", made.base)]
    if made.data is not None:
        rows.append((TUNED_ON if made.recovery else "calibration text", told_name(made.data)))
    if made.measured:
        rows.append(("measured on", made.measured))
    rows += made.recovery
    if made.rounding:
        rows.append((ROUNDING, made.rounding))
    if plan is not None:
        settings = {key: value for key, value in plan.settings.items() if value not in (None, False, [], ())}
        rows.append((PLAN, ", ".join(f"{key} {value}" for key, value in settings.items())))
        rows.append((KEPT, "`saap_plan.json`: which units every layer keeps"))
    if not rows and not made.command:
        return []
    command = [f"```\n{made.command}\n```"] if made.command else []
    return [MAKING, *command, *([_table(rows)] if rows else [])]


def recovery_in(folder: Path) -> dict[str, Any]:
    """What the card of a model directory says of its recovery, as values of ``Made``; empty where it tells of none."""
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    section = text.partition(f"\n{MAKING}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and line.endswith(" |")]
    rows = [(name, value) for name, _, value in (line[2:-2].partition(" | ") for line in lines)]
    names = [name for name, _ in rows]
    if RECOVERY not in names:
        return {}
    first = names.index(RECOVERY)
    last = next((index for index in range(first, len(names)) if names[index] in (ROUNDING, PLAN, KEPT)), len(names))
    return {"data": dict(rows).get(TUNED_ON), "recovery": tuple(rows[first:last])}


def _measured(made: Made) -> list[str]:
    found = made.evaluation
    if found is None or made.evaluated_on is None:
        return []
    rows = [
        f"| {name} | {each.perplexity:.2f} | {each.parameters:,} | {each.weight_bytes:,} | "
        f"{each.kv_cache_bytes_per_token:,} |"
        for name, each in made.rows
    ]
    header = ["| | perplexity | parameters | bytes of weights | KV cache bytes per token |", "|---|---|---|---|---|"]
    text = f"On {told_name(made.evaluated_on)}: {found.tokens:,} tokens in windows of {found.seq_len}, {found.dtype}."
    return ["## Measured", text, "\n".join(header + rows)]


def _loading(model: PreTrainedModel) -> str:
    kind = type(model).__name__
    lines = ["from transformers import AutoModelForCausalLM"]
    method = _quantisation(model).get("quant_method")
    if method == METHOD:
        lines.append("import saap  # needed: without it transformers draws random weights")
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{HERE}")')
    elif kind.startswith("Saap"):
        lines.append("import saap  # or, without saap installed, trust_remote_code=True below")
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{HERE}")')
    else:
        needs = "no saap needed" if method is None else "pip install compressed-tensors"
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{HERE}")  # a stock {kind}: {needs}')
    return "\n".join(["```python", *lines, "```"])


def _serving(model: PreTrainedModel, units: Units) -> str:
    method = _quantisation(model).get("quant_method")
    ours = _of_template(model) or method == METHOD
    lines = [
        (f"saap serve {HERE}", "OpenAI's API on transformers: pip install 'saap[serve]'"),
        (f"vllm serve {HERE}", f"vLLM, {'with saap installed' if ours else 'a stock model'}"),
    ]
    kind = _gguf_type(model, units) if method is None else None
    if kind is not None:
        lines.append((f"saap export {HERE} --gguf model.gguf --type {kind}", "llama.cpp: pip install 'saap[gguf]'"))
    width = max(len(line) for line, _ in lines)
    return "\n".join(["```", *(f"{line:{width}}  # {remark}" for line, remark in lines), "```"])


def _gguf_type(model: PreTrainedModel, units: Units) -> str | None:
    """The type of weights that ``saap export --gguf`` writes of this model: its default, f16, or None for no file."""
    try:
        form_of(model.config, units.layers)
    except ValueError:
        return None
    try:
        refuse_misaligned(units.layers, GGUF_TYPE)
    except ValueError:
        return "f16"
    return GGUF_TYPE
