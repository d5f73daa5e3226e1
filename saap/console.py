"""What the command line prints: progress with rates, tables, one-line errors, one JSON document."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from transformers.utils import logging

from saap.evaluate import Evaluation

screen = Console(stderr=True)  # stdout is for results, so that --json can be piped
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    RuntimeError,
    SafetensorError,
)  # OSError covers missing and existing files


def quiet_libraries() -> None:
    """Keep transformers' own bars and notices off the screen; errors still come through."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def user_errors(debug: bool) -> Iterator[None]:
    """Turn errors a user can mend into one line on stderr and exit code 2; ``debug`` shows the traceback."""
    try:
        yield
    except USER_ERRORS as error:
        if debug:
            raise
        screen.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:  # what can be gone on with says so
        said = str(interrupt) or "interrupted; no unfinished output was left behind"
        screen.print(said, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "it")
        return Text(f"{task.speed:.1f} {unit}/s" if task.speed else f"- {unit}/s")


class Bar:
    """One progress bar: called with (done, total), and ``say`` tells what is going on."""

    def __init__(self, shown: Progress, title: str, unit: str | None) -> None:
        self._shown, self._task = shown, shown.add_task(title, total=None, unit=unit)

    def __call__(self, done: int, total: int) -> None:
        self._shown.update(self._task, completed=done, total=total)

    def say(self, title: str) -> None:
        self._shown.update(self._task, description=title)


@contextmanager
def progress(title: str, unit: str | None, shown: bool = True) -> Iterator[Bar]:
    """A progress bar with a count and a rate of ``unit``, or with a percentage for None."""
    counts = (TaskProgressColumn(),) if unit is None else (MofNCompleteColumn(), _Rate())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not shown) as bar:
        yield Bar(bar, title, unit)


def announce(text: str) -> None:
    """Text on stdout at once, also where that is a file or a pipe."""
    print(text, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_text_table(header: list[str], rows: list[list[str]]) -> None:
    """A table of sentences, which wrap; the first two columns do not."""
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, no_wrap=index < 2)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=bool(index), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


EVALUATION_HEADER = ["model", "ppl", "parameters", "MACs/token", "MiB", "KV B/token", "tokens/s"]


def evaluation_row(name: str, result: Evaluation) -> list[str]:
    """One line of the table whose header is ``EVALUATION_HEADER``."""
    return [
        name,
        f"{result.perplexity:.2f}",
        f"{result.parameters:,}",
        f"{result.macs_per_token / 1e6:,.1f}M",
        f"{result.weight_bytes / 2**20:.1f}",
        f"{result.kv_cache_bytes_per_token:,}",
        f"{result.tokens_per_second:.0f}",
    ]
