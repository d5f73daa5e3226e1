"""The ``saap`` command: one module per group of commands, and the options they share in ``options``."""

from typing import NoReturn

import typer

from saap.cli import calibrate, check, export, inspect, plan, prune, recover, serve

app = typer.Typer(
    help="Make a language model structurally smaller in one fast pass.\n\n"
    "Start with: saap prune MODEL --data TEXT --ratio 0.2 --out DIR",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("prune")(prune.prune)
app.command("calibrate")(calibrate.calibrate)
app.command("plan")(plan.plan)
app.command("recover")(recover.recover)
app.command("eval")(inspect.evaluate_command)
app.command("info")(inspect.info)
app.command("compare")(inspect.compare)
app.command("check")(check.check)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("doctor")(inspect.doctor)


def main() -> NoReturn:
    """Entry point of the ``saap`` command."""
    app()
    raise SystemExit(0)
