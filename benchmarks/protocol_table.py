"""The Markdown table of the 7B protocol: our cells, empty until run, and published rows marked as quoted."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.protocol_cells import Cell, Settings
from benchmarks.protocol_models import KNOWN
from benchmarks.protocol_texts import describe
from benchmarks.zero_shot import TASKS
from saap.plan import write_atomically

MEAN = f"mean of {len(TASKS)}"
JOINING = (
    "The rows of a text are joined by a blank line and tokenised at once, with BOS as the tokenizer adds it (once, at "
    "the start) and `<unk>` spelt like any other text: read as LLaMA's unknown token it would multiply PTB's "
    "perplexity. The stream is cut into windows of the stated length, which do not overlap; what is left at the end "
    "is dropped. Perplexity is exp of the mean loss over all predicted tokens."
)
QUOTING = (
    "*Quoted* rows are copied as their authors published them, under their own calibration, code and version of "
    "lm_eval: compare each with its own dense row and subtract none from ours. The SAAP paper's own claim (arXiv "
    "2412.15127: +2.17 and +2.37 % accuracy over the best earlier structured pruner on LLaMA-7B and Vicuna-7B) has no "
    "row, because only its abstract and summaries could be read."
)


@dataclass(frozen=True)
class Quoted:
    """A published row, copied as printed: nothing of it was measured here."""

    model: str
    removed: str
    method: str
    source: str
    numbers: dict[str, str] = field(default_factory=dict)


SOURCES = {
    "P": "LLM-Pruner (arXiv 2305.11627), tables of its repository; 10 BookCorpus sequences of 64 tokens, its own "
    "copy of lm_eval",
    "F": "FLAP (arXiv 2312.11983), its own evaluation; calibrated on WikiText-2 train, so its WikiText-2 column is "
    "in domain",
    "L": "LoRAPrune (arXiv 2305.18403), second-hand: not read in its own tables",
    "W": "Wanda-sp, from a published table; suspect: more accurate than dense at nearly twice its perplexity",
    "R": "LLM-Pruner's repository, more results: perplexity only, 17.65 % of all parameters removed",
}


def _llama(removed: str, method: str, source: str, perplexity: str, mean: str, *accuracies: str) -> Quoted:
    tasks = dict(zip(TASKS, accuracies, strict=True)) if accuracies else {}
    return Quoted("LLaMA-7B", removed, method, source, {"wikitext2 128": perplexity, MEAN: mean} | tasks)


def _llama3(removed: str, method: str, *perplexities: str) -> Quoted:
    columns = ("wikitext2 128", "wikitext2 2048", "ptb 128", "ptb 2048")
    return Quoted("Llama-3-8B", removed, method, "R", dict(zip(columns, perplexities, strict=True)))


QUOTED = (
    _llama("0 %", "dense", "P", "12.62", "63.25", "73.18", "78.35", "72.99", "67.01", "67.45", "41.38", "42.40"),
    _llama("20 %", "LLM-Pruner element, untuned", "P", "19.09", "56.69"),
    _llama(
        "20 %",
        "LLM-Pruner + LoRA",
        "P",
        "17.58",
        "59.23",
        "64.62",
        "77.20",
        "68.80",
        "63.14",
        "64.31",
        "36.77",
        "39.80",
    ),
    _llama("20 %", "LLM-Pruner second order + LoRA", "P", "17.37", "60.07"),
    _llama("20 %", "FLAP, untuned", "F", "14.62", "62.08"),
    _llama("20 %", "LoRAPrune, tuned", "L", "16.80", "60.05"),
    _llama("20 %", "Wanda-sp, untuned", "W", "22.12", "63.35"),
    _llama("50 %", "LLM-Pruner element, untuned", "P", "112.44", "41.58"),
    _llama("50 %", "LLM-Pruner + LoRA", "P", "38.12", "48.98"),
    _llama("50 %", "FLAP, untuned", "F", "31.80", "50.37"),
    _llama("50 %", "LoRAPrune, tuned", "L", "30.12", "49.71"),
    _llama("50 %", "Wanda-sp, untuned", "W", "366.43", "37.83"),
    _llama3("0 %", "dense", "14.13", "6.14", "27.96", "10.58"),
    _llama3("17.65 %", "LLM-Pruner element, untuned", "25.60", "12.86", "47.18", "20.83"),
    _llama3("17.65 %", "LLM-Pruner L2, untuned", "64.22", "34.13", "120.84", "51.53"),
)


def read_results(out: Path) -> list[dict[str, Any]]:
    """Every cell written below ``out``; raises ValueError naming a file that is not a result."""
    found = []
    for file in sorted(out.glob("**/*.result.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file} is not a result of this command: {error}; remove it to measure it again"
            ) from error
        found.append(result)
    return found


def numbers_of(result: dict[str, Any]) -> dict[str, float]:
    """The columns of one cell: perplexities as they are, accuracies in per cent."""
    numbers = {
        f"{text} {length}": each["perplexity"]
        for text, lengths in result["perplexity"].items()
        for length, each in lengths.items()
    }
    accuracies = {task: 100 * each[TASKS[task][1]] for task, each in result["tasks"].items()}
    if len(accuracies) == len(TASKS):
        accuracies[MEAN] = statistics.mean(accuracies.values())
    return numbers | accuracies


def write_table(path: Path, cells: list[Cell], results: list[dict[str, Any]], settings: Settings) -> None:
    """Rows of the asked cells and of all results, one section per model; seeds are averaged, with their spread."""
    columns = [f"{text} {length}" for text in settings.perplexity_data for length in settings.seq_lens] + [*TASKS, MEAN]
    rows: dict[str, dict[tuple[float, str], list[dict[str, float]]]] = {}
    for cell in cells:
        rows.setdefault(cell.model.name, {}).setdefault((cell.ratio or 0.0, cell.criterion or "dense"), [])
    for result in results:
        key = (result["ratio"] or 0.0, result["criterion"] or "dense")
        rows.setdefault(result["model"], {}).setdefault(key, []).append(numbers_of(result))
    lines = _preamble(rows, settings, results)
    for model, found in rows.items():
        lines += ["", f"## {model}", "", _line("removed", "criterion", "seeds", *columns)]
        lines.append(_line(*["---"] * (3 + len(columns))))
        for (ratio, criterion), seeds in sorted(found.items(), key=lambda item: item[0][0]):  # criteria as asked
            values = [_shown([seed[column] for seed in seeds if column in seed]) for column in columns]
            lines.append(_line(f"{ratio:.0%}".replace("%", " %"), criterion, str(len(seeds) or ""), *values))
        for row in (row for row in QUOTED if row.model == model):
            values = [f"*{row.numbers[column]}*" if column in row.numbers else "" for column in columns]
            lines.append(_line(row.removed, f"*{row.method}* (quoted) [{row.source}]", "", *values))
    quoted = {row.source for row in QUOTED if row.model in rows}
    lines += ["", *(f"- [{key}] {text}." for key, text in SOURCES.items() if key in quoted)]
    write_atomically(path, "\n".join(lines) + "\n")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(values: list[float]) -> str:
    """Mean over seeds, with the sample standard deviation where there are two or more; empty for none."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _preamble(models: Iterable[str], settings: Settings, results: list[dict[str, Any]]) -> list[str]:
    """What was measured and how, so that no number stands without its conditions."""
    devices = sorted({f"{result['device']}, {result['dtype']}" for result in results})
    versions = sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results})
    texts = "; ".join(f"`{name}`: {describe(source)}" for name, source in settings.perplexity_data.items())
    known = [f"- {name} is `{KNOWN[name].path}`: {KNOWN[name].why}." for name in models if name in KNOWN]
    warnings = []
    if settings.limit is not None:
        warnings = [f"**Only the first {settings.limit} rows of each task: a check of the command, not a result.**", ""]
    if settings.task_folder is not None:
        warnings += ["**Task rows come from a local folder, not from the published data sets: compare nothing.**", ""]
    return [
        "# The 7B protocol",
        "",
        "SAAP as reconstructed, nothing tuned after pruning. Written by `python -m benchmarks.protocol_7b`; an empty",
        "cell was not run.",
        "",
        *warnings,
        *known,
        "- removed: share of all parameters, embeddings in the denominator. "
        f"Search: `{settings.method}`, the same for all criteria.",
        f"- Calibration: {describe(settings.calibration)}; {settings.samples} sequences of {settings.seq_len} tokens. "
        "The seed orders the documents; mean ± standard deviation over seeds.",
        f"- Perplexity (lower is better): {texts}. " + JOINING,
        "- Accuracy in per cent (higher is better): lm_eval's own tasks, no examples in the prompt; normalised by "
        "answer length for PIQA, HellaSwag, ARC and OpenBookQA, plain for BoolQ and WinoGrande.",
        f"- Measured on: {'; '.join([*devices, *versions]) or 'nothing yet'}.",
        "- " + QUOTING,
    ]
