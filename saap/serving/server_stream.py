"""The server-sent events of transformers' handlers, as OpenAI sends them."""

import json
from collections.abc import AsyncIterator
from typing import Any

from saap.serving.server_generation import cut, held_back
from saap.serving.server_requests import CHAT, Asked

START, DONE = "data: ", "data: [DONE]\n\n"


async def openai_stream(events: Any, asked: Asked) -> AsyncIterator[str]:
    """Events without stop sequences, with usage only where it was asked for, and with an end.

    ``events`` is closed with this generator, so that a client who leaves ends the generation.
    """
    stops, last, usage = _Stops(asked), None, None
    try:
        async for text in events:
            for event in filter(None, text.split("\n\n")):
                chunk = _read(event)
                if "error" in chunk:
                    yield _written(chunk)
                    return
                usage = chunk.pop("usage", None) or usage
                last = chunk
                for each in stops.passed(chunk):
                    yield _written(each)
        if asked.usage and last is not None:
            yield _written(last | {"choices": [], "usage": usage})
        yield DONE
    finally:
        await events.aclose()


class _Stops:
    """Holds text back while it may be the beginning of a stop sequence, and drops what follows one."""

    def __init__(self, asked: Asked) -> None:
        self._chat, self._stops = asked.kind == CHAT, asked.stop
        self._held, self._ended = "", False

    def passed(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks to send now, in place of ``chunk``."""
        choice = chunk["choices"][0]
        owner, name = (choice["delta"], "content") if self._chat else (choice, "text")
        end = choice.get("finish_reason")
        text = self._held + (owner.get(name) or "")
        if self._ended:
            text = ""
        elif (before := cut(text, self._stops)) != text:
            text, self._ended = before, True
        kept = len(text) if end or self._ended else len(text) - held_back(text, self._stops)
        self._held = "" if self._ended else text[kept:]
        if owner.get(name) is not None or text[:kept]:
            owner[name] = text[:kept]
        if end == "length" and self._ended:
            choice["finish_reason"] = "stop"
        empty = not text[:kept] and not end and not set(owner) - {name, "index", "finish_reason"}
        return [] if empty else [chunk]


def _read(event: str) -> dict[str, Any]:
    """One event; the text of an error may hold quotes that transformers does not escape."""
    data = event.removeprefix(START)
    try:
        chunk = json.loads(data)
    except json.JSONDecodeError:
        chunk = {"error": data.removeprefix('{"error": "').removesuffix('"}')}
    if isinstance(chunk.get("error"), str):
        chunk["error"] = {"message": chunk["error"], "type": "server_error", "param": None, "code": None}
    return dict(chunk)


def _written(chunk: dict[str, Any]) -> str:
    return f"{START}{json.dumps(chunk)}\n\n"
