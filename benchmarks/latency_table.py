"""Measure a latency table for searches by time: ``python -m benchmarks.latency_table MODEL --out FILE``.

One decoder layer of the model's configuration, random weights, is cut to a list of KV head counts and MLP widths;
each size's forward pass is timed, sizes alternating, median. What a layer takes beside its attention and
MLP (norms, residuals) is shared out between both at their smallest sizes. Searches use differences, in which it
cancels unless whole modules go.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.common import SMALL_MODEL, Row
from benchmarks.tasks import Task, run_tasks
from benchmarks.timing import interleave
from saap.compact import compact
from saap.families import family_of, layers_of
from saap.latency import LatencyTable, device_name
from saap.plan import LayerPlan, Plan
from saap.undo import Undo
from saap.units import discover

POINTS = 10  # sizes measured of each module, and their smallest


def one_layer_model(config: Any, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The configuration's architecture with a single layer and random weights."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def sizes_of(count: int, multiple: int) -> list[int]:
    """About POINTS sizes up to ``count``, multiples of ``multiple`` and ``count`` itself, ascending."""
    steps = max(1, count // multiple)
    chosen = {max(1, round(steps * i / POINTS)) * multiple for i in range(1, POINTS + 1)}
    return sorted({min(size, count) for size in chosen} | {min(multiple, count), count})


@torch.no_grad()
def layer_call(model: PreTrainedModel, tokens: int, context: int) -> Callable[[int], Any]:
    """The only layer's forward pass for ``tokens`` new tokens after ``context`` cached ones, to be repeated."""
    layer = layers_of(model, family_of(model))[0]
    cache = DynamicCache(config=model.config)
    if context:
        model(input_ids=torch.zeros(1, context, dtype=torch.long, device=model.device), past_key_values=cache)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = layer.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache)
    handle.remove()
    args, kwargs = calls[0]

    @torch.no_grad()
    def call(_index: int) -> None:
        cache.crop(-tokens)
        layer(*args, **kwargs)

    return call


@torch.no_grad()
def rest_call(model: PreTrainedModel, tokens: int) -> Callable[[int], Any]:
    """Everything but the layer: embeddings, final norm, head."""
    undo = Undo()
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def call(_index: int) -> None:
        undo.patch_forward(layers_of(model, family_of(model))[0], lambda hidden_states, *_, **__: hidden_states)
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            undo.restore()

    return call


def measure_table(
    config: Any, *, dtype: torch.dtype, device: str, tokens: int, context: int, multiple: int, repeats: int
) -> LatencyTable:
    """Time every size and put the table together; ValueError for more tokens than a sliding window holds."""
    window = getattr(config, "sliding_window", None)
    if window and context + tokens >= window:
        raise ValueError(
            f"context and tokens must stay below the sliding window of {window}; got {context} and {tokens}"
        )
    dense = one_layer_model(config, dtype, device)
    units = discover(dense)
    layer = units.layers[0]
    heads, widths = sizes_of(layer.kv_heads, 1), sizes_of(layer.intermediate_size, multiple)
    calls = {"rest": rest_call(dense, tokens)}
    for kept_heads, width in [(n, widths[0]) for n in heads] + [(heads[0], w) for w in widths[1:]]:
        plan = Plan(units, (LayerPlan(tuple(range(kept_heads)), tuple(range(width))),))
        calls[f"{kept_heads} {width}"] = layer_call(compact(dense, plan, copy=True), tokens, context)
    seconds = interleave(calls, repeats, 1, device)
    attention, mlp = points(seconds, heads, widths)
    return LatencyTable(
        device=device_name(), dtype=str(dtype).removeprefix("torch."), tokens=tokens, context=context,
        **{name: getattr(layer, name) for name in ("hidden_size", "head_dim", "group", "gated")},
        attention=attention, mlp=mlp, rest=seconds["rest"],
    )  # fmt: skip


Points = tuple[tuple[int, float], ...]


def points(seconds: dict[str, float], heads: list[int], widths: list[int]) -> tuple[Points, Points]:
    """(size, seconds) of attention and MLP, each holding half of the smallest layer; noise never makes one 0."""
    half = seconds[f"{heads[0]} {widths[0]}"] / 2
    attention = tuple((n, max(seconds[f"{n} {widths[0]}"] - half, half / 10)) for n in heads)
    return attention, tuple((w, max(seconds[f"{heads[0]} {w}"] - half, half / 10)) for w in widths)


def rows_of(table: LatencyTable) -> list[Row]:
    rows = [Row.single(f"attention, {n} KV heads", s * 1e6, "us") for n, s in table.attention]
    rows += [Row.single(f"MLP, {w} channels", s * 1e6, "us") for w, s in table.mlp]
    return [*rows, Row.single("the rest of the model", table.rest * 1e6, "us")]


def tasks(args: argparse.Namespace) -> list[Task]:
    def measure() -> list[Row]:
        table = measure_table(
            AutoConfig.from_pretrained(args.model), dtype=getattr(torch, args.dtype),
            device="cuda" if torch.cuda.is_available() else "cpu", tokens=args.tokens, context=args.context,
            multiple=args.multiple, repeats=3 if args.quick else args.repeats,
        )  # fmt: skip
        if args.out:
            table.save(args.out)
        return rows_of(table)

    return [Task("latency_table", measure)]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=str(SMALL_MODEL), help="a model directory or hub name")
    parser.add_argument("--out", type=Path, help="where the table goes")
    parser.add_argument("--tokens", type=int, default=1, help="new tokens of one forward pass (1: decoding)")
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--multiple", type=int, default=32, help="widths measured are multiples of this")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


if __name__ == "__main__":
    run_tasks(__doc__ or "", tasks, options)
