"""The command line, in this process."""

from typer.testing import CliRunner

from saap.cli import app


def run(*arguments: object, code: int = 0):
    """The result of ``saap ARGUMENTS``, which must end with that exit code."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result
