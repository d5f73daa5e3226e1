"""What a request of OpenAI's API may ask of the server: checked before any work, refused with the field's name."""

import json
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from saap.serving.server_body import SHOWN, Refused, check_values, shown

COMPLETION, CHAT = "completions", "chat completions"
DEFAULT_TOKENS = {
    COMPLETION: 16,
    CHAT: 1024,
}  # OpenAI's; transformers', where OpenAI's is the context
MOST_STOPS = 4  # as OpenAI
MOST_DIGITS = 20  # of a token in logit_bias: more than any vocabulary needs
ROLES = ("system", "developer", "user", "assistant", "tool")

# Fields that change the answer and that transformers' serving code does not know, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "modalities": (["text"],),
}
IGNORED = (
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity",
)  # fmt: skip
# What transformers passes to the chat template itself, or what would replace the checkpoint's template.
RESERVED_TEMPLATE_ARGUMENTS = (
    "self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "load_audio_from_video",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A checked request: the ``body`` that transformers' handlers get, and what the server does around them.

    ``tokens`` None stands for the default of the ``kind``, cut to what the context leaves. ``gone`` is set once nobody
    waits for the answer.
    """

    kind: str
    body: dict[str, Any]
    stream: bool
    usage: bool
    tokens: int | None
    seed: int | None
    stop: tuple[str, ...]
    gone: threading.Event = field(default_factory=threading.Event)


ASKED: ContextVar[Asked] = ContextVar("ASKED")  # of the request whose handler is running


def check_request(body: object, kind: str, model: str, path: str) -> Asked:
    """Check the JSON ``body`` of a request; ``model`` and ``path`` are the served one's names. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused(f"expected a JSON object as body, got {type(body).__name__}")
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name, neutral in NEUTRAL.items():
        if name in given and not _asks_for_nothing(value := given.pop(name), neutral):
            like = " or ".join(json.dumps(each) for each in neutral)
            raise Refused(f"{name} is not supported by this server: leave it out (or {like}), got {shown(value)}", name)
    named = given.pop("model", model)
    if named not in (model, path):
        raise Refused(
            f"the model {shown(named)} does not exist: this server has {model!r}", "model", 404, "model_not_found"
        )
    kept: dict[str, Any] = {"model": model, "stream": _stream(given)}
    options = given.pop("stream_options", None)
    for name, (expected, holds) in FIELDS[kind].items():
        if name in given:
            kept[name] = given.pop(name)
            if not holds(kept[name]):
                raise Refused(f"{name}: expected {expected}, got {shown(kept[name])}", name)
    if given:
        unknown = next(iter(given))
        raise Refused(f"this server knows no field {shown(unknown)} of {kind}", unknown[:SHOWN])
    needed = "prompt" if kind == COMPLETION else "messages"
    if needed not in kept:
        raise Refused(f"{needed}: missing", needed)
    if kind == COMPLETION and isinstance(kept["prompt"], list):
        kept["prompt"] = kept["prompt"][0]
    if kind == CHAT:
        kept["messages"] = [_checked(each, f"messages[{index}]") for index, each in enumerate(kept["messages"])]
    tokens = kept.pop("max_completion_tokens", None) or kept.get("max_tokens")
    for name in ("stop", "logit_bias"):
        if not kept.get(name):
            kept.pop(name, None)
    stop = kept.get("stop") or ()
    return Asked(
        kind=kind,
        body=kept,
        stream=kept["stream"],
        usage=_usage_asked(options, kept["stream"]),
        tokens=tokens,
        seed=kept.pop("seed", None),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def _asks_for_nothing(value: object, neutral: tuple[Any, ...]) -> bool:
    """Whether ``value`` is a neutral one; JSON's 0 is not its false, which Python takes for equal."""
    return any(value == each and isinstance(value, bool) is isinstance(each, bool) for each in neutral)


def _stream(given: dict[str, Any]) -> bool:
    stream = given.pop("stream", False)
    if not isinstance(stream, bool):
        raise Refused(f"stream: expected true or false, got {shown(stream)}", "stream")
    return stream


def _usage_asked(options: object, stream: bool) -> bool:
    if options is None:
        return False
    asked = options.get("include_usage", False) if isinstance(options, dict) else None
    if not stream or not isinstance(asked, bool):
        raise Refused("stream_options: expected {'include_usage': true} beside stream=true", "stream_options")
    return asked


def _checked(message: object, name: str) -> dict[str, Any]:
    """A message of text, without absent tool calls; parts that are none would be left out silently."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Refused(f"{name}: expected a message whose role is one of {', '.join(ROLES)}", "messages")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    texts = all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts)
    if not texts or not isinstance(content, str | list | None):
        raise Refused(f"{name}: expected text as content; this model reads nothing else", "messages")
    if content is None and not message.get("tool_calls"):
        raise Refused(f"{name}: missing content", "messages")
    calls = message.get("tool_calls")
    calls = [] if calls is None else calls
    if not isinstance(calls, list) or not all(
        isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls
    ):
        raise Refused(f"{name}: expected tool_calls to be a list of functions", "messages")
    for index, call in enumerate(calls):
        found = _parsed(call["function"].get("arguments"))
        if not isinstance(call["function"].get("name"), str) or not isinstance(found, dict):
            raise Refused(f"{name}: expected tool_calls with a name and a JSON object as arguments", "messages")
        check_values(f"{name}.tool_calls[{index}].function.arguments", found, "messages")
    return {key: value for key, value in message.items() if key != "tool_calls" or calls}


def _parsed(arguments: object) -> object:
    """A tool call's arguments, given as JSON's text or as they are; None for other text."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= MOST_STOPS and all(isinstance(t, str) and t for t in texts)


def _prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and len(value) == 1 and isinstance(value[0], str))


def _biases(value: Any) -> bool:
    holds = _number(-100, 100)
    return isinstance(value, dict) and all(_token(token) and holds(bias) for token, bias in value.items())


def _token(text: str) -> bool:
    return text.isdecimal() and len(text) <= MOST_DIGITS


def _template_arguments(value: Any) -> bool:
    return isinstance(value, dict) and not set(value) & set(RESERVED_TEMPLATE_ARGUMENTS)


Rule = tuple[str, Callable[[Any], bool]]
_SAMPLING: dict[str, Rule] = {
    "max_tokens": ("a number of tokens, at least 1", _whole(1, 2**31)),
    "temperature": ("a number from 0 (greedy) to 2", _number(0, 2)),
    "top_p": ("a number above 0, at most 1", lambda value: _number(0, 1)(value) and value > 0),
    "seed": ("a whole number of 64 bits", _whole(-(2**63), 2**63 - 1)),
    "stop": (f"a text or a list of at most {MOST_STOPS} texts, none empty", _stops),
    # transformers takes 1 + it as repetition penalty
    "frequency_penalty": ("a number from 0 to 2", _number(0, 2)),
    "logit_bias": ("{token: bias from -100 to 100}", _biases),
}
FIELDS: dict[str, dict[str, Rule]] = {
    COMPLETION: _SAMPLING | {"prompt": ("one text", _prompt)},
    CHAT: _SAMPLING
    | {
        "messages": ("a list of messages, not empty", lambda value: isinstance(value, list) and len(value) > 0),
        "max_completion_tokens": _SAMPLING["max_tokens"],
        "tools": ("a list of tools", lambda value: isinstance(value, list) and all(isinstance(t, dict) for t in value)),
        "chat_template_kwargs": ("a JSON object of the chat template's own variables", _template_arguments),
    },
}
