"""The JSON body of a request as Python values that can be written out again: what cannot is refused by its name."""

import json
from typing import Any

MOST_LEVELS = 100  # of lists and objects in each other; a tool's JSON schema has some ten
SHOWN = 60  # characters of a value in an error


class Refused(Exception):
    """A request that gets an error of OpenAI's form: HTTP ``status``, the ``field`` at fault and a ``code``."""

    def __init__(self, message: str, field: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.field, self.status, self.code = field, status, code


def shown(value: object) -> str:
    """A value as Python writes it, short enough for an error."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


class LongInteger(float):
    """An integer of more digits than Python converts: beyond every bound, and told by its digits."""

    def __new__(cls, digits: str) -> "LongInteger":
        return super().__new__(cls, digits)

    def __init__(self, digits: str) -> None:
        self._shown = f"{digits[:20]}... ({len(digits.lstrip('-'))} digits)"

    def __repr__(self) -> str:
        return self._shown


def read_body(raw: bytes) -> Any:
    """The values of a body. Raises Refused, naming the field, for text that is no Unicode and for deep nesting."""
    try:
        body = json.loads(raw, parse_int=_integer)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"expected JSON as body: {error}") from error
    except RecursionError as error:
        raise Refused(f"expected JSON as body of at most {MOST_LEVELS} levels, got more") from error
    if isinstance(body, dict):
        for name, value in body.items():
            _check_text(name, "the name of a field", None)
            check_values(name[:SHOWN], value, name[:SHOWN])
    return body


def _integer(digits: str) -> int | LongInteger:
    try:
        return int(digits)
    except ValueError:
        return LongInteger(digits)


def check_values(name: str, value: object, field: str) -> None:
    """Refuse what ``value``, called ``name`` in ``field``, holds of deep nesting and of text that is no Unicode."""
    pending = [(name, value, 1)]  # without recursion
    while pending:
        name, each, level = pending.pop()
        if level > MOST_LEVELS and isinstance(each, dict | list):
            raise Refused(f"{field}: expected at most {MOST_LEVELS} levels of lists and objects, got more", field)
        if isinstance(each, str):
            _check_text(each, name, field)
        elif isinstance(each, dict):
            for key in each:
                _check_text(key, f"a name in {name}", field)
            pending.extend((f"{name}.{key[:SHOWN]}", held, level + 1) for key, held in each.items())
        elif isinstance(each, list):  # of which numbers, as of token ids, can be many
            pending.extend(
                (f"{name}[{i}]", held, level + 1) for i, held in enumerate(each) if isinstance(held, str | dict | list)
            )


def _check_text(text: str, name: str, field: str | None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        raise Refused(
            f"{name}: expected Unicode text, got {shown(text)} with the lone surrogate {surrogate}", field
        ) from error
