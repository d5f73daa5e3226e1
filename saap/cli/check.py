"""``saap check``."""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from saap import console
from saap.cli.options import AsJson, Debug
from saap.plan import to_ranges
from saap.serving.check import Check, Finding, check_all
from saap.serving.check import check as check_directory
from saap.serving.targets import BLOCKS, TARGETS


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, dense or pruned.")],
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="|".join(TARGETS), help="The runtime to check for. Default: all, in one table."),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="So many devices share every layer.")] = 1,
    kind: Annotated[
        str | None, typer.Option("--type", help=f"Weights of this type there: {', '.join(BLOCKS)}.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say whether a runtime takes the sizes of a model, why not, and how to serve it there. No weight is loaded.

    The exit code is 0 if it does, 1 if not and 2 for what cannot be checked; without --for it is 0 or 2.

    Example: `saap check my-llama-20 --for llama.cpp --type q8_0`
    """
    console.quiet_libraries()
    with console.user_errors(debug):
        if target is None:
            if kind is not None:
                raise ValueError(f"--type is of one runtime: expected --for beside it, got --type {kind}")
            _print_all(check_all(folder, tensor_parallel=tensor_parallel), as_json)
            return
        found = check_directory(folder, target, tensor_parallel=tensor_parallel, type=kind)
        _print_one(found, as_json)
    if not found.valid:
        raise typer.Exit(1)


def _print_all(found: list[Check], as_json: bool) -> None:
    if as_json:
        console.print_json([each.to_dict() for each in found])
        return
    rows = [[each.target, "valid" if each.valid else "not valid", _why_not(each)] for each in found]
    console.print_text_table(["target", "", "why not"], rows)
    for each in found:
        if each.valid:
            typer.echo(f"serve for {each.target}: {each.command}")


def _why_not(found: Check) -> str:
    faults = [finding for finding in found.findings if finding.fault]
    if not faults:
        return ""
    first, more = faults[0], f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    where = "" if first.layer is None else f"layer {first.layer}: "
    return f"{where}{first.found}; expected {first.needed}{more}"


def _print_one(found: Check, as_json: bool) -> None:
    if as_json:
        console.print_json(found.to_dict())
        return
    if found.findings:
        rows = [
            [_layers(same), first.part, first.found, first.needed, ("" if first.fault else "runs: ") + first.remedy]
            for first, same in _grouped(found.findings)
        ]
        console.print_text_table(["layer", "part", "found", "needed", "remedy"], rows)
    faults = sum(finding.fault for finding in found.findings)
    what = f"not valid, {faults} finding{'s' if faults > 1 else ''}" if faults else "valid"
    typer.echo(f"{found.target}: {what}")
    typer.echo(f"for: {found.title}")
    typer.echo(f"{'serve' if found.valid else 'once valid, serve'}: {found.command}")
    typer.echo(f"needs: {'; '.join(found.needs)}")


def _grouped(findings: tuple[Finding, ...]) -> list[tuple[Finding, list[Finding]]]:
    """Findings that differ in their layer alone, under the first of them."""

    def texts(finding: Finding) -> tuple[str, ...]:
        return (finding.part, finding.found, finding.needed, finding.remedy)

    first = {texts(finding): index for index, finding in reversed(list(enumerate(findings)))}
    ordered = sorted(findings, key=lambda finding: first[texts(finding)])
    groups = [list(same) for _, same in groupby(ordered, key=texts)]
    return [(same[0], same) for same in groups]


def _layers(findings: list[Finding]) -> str:
    layers = tuple(finding.layer for finding in findings if finding.layer is not None)
    return to_ranges(layers) or "all"
