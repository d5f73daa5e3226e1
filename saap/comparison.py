"""Two model directories side by side: sizes from their files and, given text, perplexity and speed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from saap.evaluate import Evaluation, Progress, evaluate
from saap.model_info import ModelInfo, model_info
from saap.opening import open_model, open_tokenizer
from saap.plan import write_atomically
from saap.report import environment, evaluation_facts, now
from saap.report_data import Fact, Report, Widths
from saap.report_page import amount, change, render, setting


@dataclass(frozen=True)
class Comparison:
    """Model ``a`` and model ``b``; ``evaluation`` is that of b, against a."""

    a: ModelInfo
    b: ModelInfo
    evaluation: Evaluation | None = None

    @property
    def names(self) -> tuple[str, str]:
        """The last parts of both paths, as many as it takes to tell them apart."""
        a, b = (Path(os.path.abspath(info.path)).parts for info in (self.a, self.b))
        for count in range(1, max(len(a), len(b))):
            if a[-count:] != b[-count:]:
                return "/".join(a[-count:]), "/".join(b[-count:])
        return a[-1], b[-1]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, of a, of b, change from a to b), formatted."""
        a, b = self.a, self.b
        words = [
            ("family", a.family, b.family),
            ("layout", a.layout, b.layout),
            ("dtype", a.dtypes, b.dtypes),
            ("written by", a.written_by, b.written_by),
            ("tokenizer", setting(a.tokenizer), setting(b.tokenizer)),
        ]
        numbers: list[tuple[str, float, float, str]] = [
            ("layers", len(a.layers), len(b.layers), "count"),
            ("parameters", a.parameters, b.parameters, "count"),
            ("parameters of the decoder layers", a.block_parameters, b.block_parameters, "count"),
            ("weight files", a.weight_bytes, b.weight_bytes, "bytes"),
            ("KV cache per token", a.kv_cache_bytes_per_token, b.kv_cache_bytes_per_token, "bytes"),
        ]
        if self.evaluation is not None and self.evaluation.against is not None:
            after, before = self.evaluation, self.evaluation.against
            numbers.insert(0, ("perplexity", before.perplexity, after.perplexity, "perplexity"))
            numbers.append(("decoding speed", before.tokens_per_second, after.tokens_per_second, "tokens/s"))
            numbers.append(("MACs per token", before.macs_per_token, after.macs_per_token, "count"))
        found = [(name, amount(x, unit), amount(y, unit), change(y, x)) for name, x, y, unit in numbers]
        return found + [(name, x, y, "unchanged" if x == y else "differs") for name, x, y in words]

    def differing_layers(self) -> list[tuple[Any, ...]]:
        """(layer, KV heads of a and b, channels of a and b) where they differ; 0 for a layer that one lacks.

        Of mixtures of experts, the channels of each expert and then the experts.
        """
        rows = zip(*(zip(each.before, each.after, strict=True) for each in _widths(self.a, self.b)), strict=True)
        return [(index, *row) for index, row in enumerate(rows) if any(a != b for a, b in row)]

    def to_dict(self) -> dict[str, Any]:
        names = ("kv_heads", "channels", "experts")  # experts of mixtures only
        return {
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "differing_layers": [
                {"layer": index} | {name: list(pair) for name, pair in zip(names, row, strict=False)}
                for index, *row in self.differing_layers()
            ],
            "evaluation": self.evaluation and self.evaluation.to_dict(),
        }

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the comparison as one self-contained HTML file, atomically."""
        write_atomically(Path(path), render(_report(self)))


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    text: Any = None,
    *,
    seq_len: int = 2048,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two model directories; weights are loaded only to evaluate both on ``text``.

    Raises what ``model_info`` and ``evaluate`` raise, and ValueError when the two have different vocabularies,
    whose perplexities could not be compared.
    """
    infos = model_info(a), model_info(b)
    if text is None:
        return Comparison(*infos)
    tokenizer = _shared_tokenizer(os.fspath(a), os.fspath(b))
    models = open_model(os.fspath(a), dtype), open_model(os.fspath(b), dtype)
    found = evaluate(models[1], tokenizer, text, seq_len=seq_len, against=models[0], progress=progress)
    return Comparison(*infos, found)


def _shared_tokenizer(a: str, b: str) -> PreTrainedTokenizerBase | None:
    first, second = open_tokenizer(a), open_tokenizer(b)
    if first is not None and second is not None and first.get_vocab() != second.get_vocab():
        raise ValueError(f"{a} and {b} have different vocabularies, so their perplexities cannot be compared")
    return first if first is not None else second


def _widths(a: ModelInfo, b: ModelInfo) -> tuple[Widths, ...]:
    """Sizes per layer; 0 where one model has fewer layers."""
    count = max(len(a.layers), len(b.layers))

    def of(info: ModelInfo, attribute: str) -> list[int]:
        found = [getattr(layer, attribute) for layer in info.layers]
        return found + [0] * (count - len(found))

    mixture = any(layer.experts for layer in a.layers + b.layers)
    names = {"KV heads": "kv_heads", "channels of each expert" if mixture else "MLP channels": "intermediate_size"}
    names |= {"experts": "experts"} if mixture else {}
    return tuple(Widths(name, of(a, attribute), of(b, attribute)) for name, attribute in names.items())


def _report(found: Comparison) -> Report:
    a, b, names = found.a, found.b, found.names
    evaluation = found.evaluation
    facts = [
        Fact("Parameters", a.parameters, b.parameters, "count"),
        Fact("Weight files", a.weight_bytes, b.weight_bytes, "bytes"),
        Fact("KV cache per token", a.kv_cache_bytes_per_token, b.kv_cache_bytes_per_token, "bytes"),
    ]
    rows = []
    if evaluation is not None and evaluation.against is not None:
        facts = evaluation_facts(evaluation.against, evaluation)
        rows = list(zip(names, (evaluation.against.to_dict(), evaluation.to_dict() | {"against": None}), strict=True))
    differing = len(found.differing_layers())
    return Report(
        title=f"{names[1]} against {names[0]}",
        summary=f"{differing} of {max(len(a.layers), len(b.layers))} layers differ in size.",
        names=names,
        facts=facts,
        widths=list(_widths(a, b)),
        evaluations=rows,
        settings={f"{letter}: {name}": _settings(info) for letter, name, info in zip("AB", names, (a, b), strict=True)},
        environment={} if evaluation is None else environment(torch.device(evaluation.device)),
        made=now(),
    )


def _settings(info: ModelInfo) -> dict[str, Any]:
    shown = {name: getattr(info, name) for name in ("family", "layout", "dtypes", "tokenizer", "written_by")}
    if info.plan is not None:
        shown |= {"removed": f"{info.plan.ratio:.2%} of all parameters"} | info.plan.settings
    return shown
