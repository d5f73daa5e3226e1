"""What ``saap serve`` refuses, in the form that OpenAI's client reads, and that it goes on afterwards."""

import asyncio

import httpx
import openai
import pytest

from saap.serving.server import open_served
from saap.serving.server_app import build_app
from tests.serving.running import ASGI, CONTEXT, MESSAGES, running, saved


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "'gpt-4' does not exist: this server has 'tiny'"),
        ({"model": "../../etc"}, openai.NotFoundError, "does not exist: this server has 'tiny'"),
        ({"model": 3}, openai.NotFoundError, "the model 3 does not exist"),
        ({"prompt": "a" * CONTEXT}, openai.BadRequestError, f"{CONTEXT} tokens; the prompt has {CONTEXT + 1}"),
        ({"max_tokens": CONTEXT}, openai.BadRequestError, f"the prompt has 2 and max_tokens {CONTEXT}"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: expected a number of tokens, at least 1, got 0"),
        ({"prompt": None}, openai.BadRequestError, "prompt: missing"),
        ({"prompt": ["a", "b"]}, openai.BadRequestError, "prompt: expected one text"),
        ({"prompt": [1, 2]}, openai.BadRequestError, "prompt: expected one text"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature: expected a number from 0"),
        ({"top_p": 0}, openai.BadRequestError, "top_p: expected a number above 0"),
        ({"seed": 1.5}, openai.BadRequestError, "seed: expected a whole number"),
        ({"stop": [""]}, openai.BadRequestError, "stop: expected a text or a list of at most 4"),
        ({"n": 2}, openai.BadRequestError, "n is not supported by this server"),
        ({"logprobs": 3}, openai.BadRequestError, "logprobs is not supported by this server"),
        ({"logit_bias": {"64": 1}}, openai.BadRequestError, "logit_bias: the model has no token 64"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "beside stream=true"),
        ({"extra_body": {"generation_config": "{}"}}, openai.BadRequestError, "no field 'generation_config'"),
        ({"extra_body": {"stream": "yes"}}, openai.BadRequestError, "stream: expected true or false"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(client, change: dict, error: type, message: str) -> None:
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    with pytest.raises(error, match=message.replace("[", r"\[")) as caught:
        client.completions.create(**asked | change)
    assert caught.value.type == "invalid_request_error"
    assert client.completions.create(**asked).usage.completion_tokens == 2  # the server goes on


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: expected a list of messages, not empty"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, r"messages\[0\]: expected a message whose role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: missing content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "the chat template refuses these messages: no tools here"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
            r"messages\[0\]: expected text as content",
        ),
        ({"messages": [{"role": "user", "content": "a" * CONTEXT}]}, f"this model's context is {CONTEXT} tokens"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, "chat_template_kwargs: expected"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_are_refused_by_name(client, change: dict, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 2} | change)


CALL = '{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": ARGUMENTS}}]}'
NINES, DEEP = "9" * 5000, "[" * 200 + "]" * 200


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", r'"a\ud800"', r"prompt: expected Unicode text, got 'a\ud800' with the lone surrogate \ud800"),
        ("prompt", r'["\udc00"]', r"prompt[0]: expected Unicode text, got '\udc00' with the lone surrogate \udc00"),
        ("stop", r'["b", "\ud800"]', "stop[1]: expected Unicode text"),
        ("user", r'{"\ud800": 1}', "a name in user: expected Unicode text"),
        ("prompt", f"[{NINES}]", "prompt: expected one text, got [99999999999999999999... (5000 digits)]"),
        ("prompt", f"[[1, {NINES}]]", "prompt: expected one text, got [[1, 99999999999999999999... (5000 digits)]]"),
        ("prompt", "[]", "prompt: expected one text, got []"),
        ("max_tokens", NINES, "max_tokens: expected a number of tokens, at least 1, got 999999"),
        ("max_tokens", f"1{'0' * 400}", "max_tokens: expected a number of tokens, at least 1, got 1000000"),
        ("max_tokens", "true", "max_tokens: expected a number of tokens, at least 1, got True"),
        ("seed", f"-{NINES}", "seed: expected a whole number of 64 bits, got -9999999999999999999... (5000 digits)"),
        ("seed", str(2**63), "seed: expected a whole number of 64 bits, got 9223372036854775808"),
        ("temperature", "NaN", "temperature: expected a number from 0 (greedy) to 2, got nan"),
        ("temperature", "Infinity", "temperature: expected a number from 0 (greedy) to 2, got inf"),
        ("top_p", "1e-400", "top_p: expected a number above 0, at most 1, got 0.0"),
        ("logit_bias", f'{{"{NINES}": 1}}', "logit_bias: expected {token: bias from -100 to 100}, got {'99999"),
        ("logit_bias", '{"5": NaN}', "logit_bias: expected {token: bias from -100 to 100}, got {'5': nan}"),
        ("logprobs", "0", "logprobs is not supported by this server: leave it out (or false), got 0"),
        ("n", "true", "n is not supported by this server: leave it out (or 1), got True"),
        ("n", NINES, "n is not supported by this server: leave it out (or 1), got 99999"),
        ("echo", "0", "echo is not supported by this server: leave it out (or false), got 0"),
        ("prompt", DEEP, "prompt: expected at most 100 levels of lists and objects, got more"),
        ("metadata", "[" * 100_000, "expected JSON as body of at most 100 levels, got more"),
    ],
)  # fmt: skip
def test_values_that_json_holds_and_no_field_takes_are_refused_by_name(
    client, field: str, value: str, message: str
) -> None:
    fields = {"model": '"tiny"', "prompt": '"a"', "max_tokens": "1"} | {field: value}
    for stream in ("true", "false"):
        body = ", ".join(f'"{name}": {text}' for name, text in (fields | {"stream": stream}).items())
        answer = httpx.post(f"{client.base_url}completions", content=f"{{{body}}}")
        error = answer.json()["error"]
        assert answer.status_code == 400 and message in error["message"] and len(error["message"]) < 300
        assert error["type"] == "invalid_request_error"
        assert error["param"] == (None if message.startswith("expected JSON") else field)


def test_a_client_who_leaves_within_its_body_is_no_error_of_the_server(served) -> None:
    scope = ASGI | {"path": "/v1/completions"}
    parts = iter([{"type": "http.request", "body": b'{"prompt": "a', "more_body": True}, {"type": "http.disconnect"}])
    sent: list[dict] = []

    async def receive() -> dict:
        return next(parts)

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(build_app(served)(scope, receive, send))
    assert sent[0]["status"] == 499


def test_the_names_of_unknown_fields_are_shortened_and_unicode(client) -> None:
    for name, message in (
        ("x" * 5000, "this server knows no field 'xxx"),
        (r"\ud800", "the name of a field: expected"),
    ):
        answer = httpx.post(f"{client.base_url}completions", content=f'{{"prompt": "a", "{name}": 1}}')
        error = answer.json()["error"]
        assert answer.status_code == 400 and message in error["message"] and len(answer.text) < 400
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="m" * 5000, prompt="a")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (r'{"role": "user", "content": "\ud800"}', "messages[0].content: expected Unicode text"),
        (r'{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}', "messages[0].content[0].text: expected"),
        ('{"role": "assistant", "content": "a", "tool_calls": 0}', "messages[0]: expected tool_calls to be a list"),
        ('{"role": "assistant", "content": "a", "tool_calls": false}', "messages[0]: expected tool_calls to be a list"),
        (
CALL.replace("ARGUMENTS", r'"{\"a\": \"\\ud800\"}"'),
            "messages[0].tool_calls[0].function.arguments.a: expected Unicode text",
        ),
        (NINES, "messages[0]: expected a message whose role is one of system"),
        (DEEP, "messages: expected at most 100 levels of lists and objects, got more"),
    ],
)  # fmt: skip
def test_messages_that_no_tokenizer_reads_are_refused_by_name(client, message: str, told: str) -> None:
    body = f'{{"model": "tiny", "max_tokens": 1, "messages": [{message}]}}'
    answer = httpx.post(f"{client.base_url}chat/completions", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages") and told in error["message"]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [("completions", 400, "expected JSON as body"), ("load_model", 404, "Not Found"), ("responses", 404, "Not Found")],
)
def test_other_routes_and_bodies_get_openais_errors(client, path: str, status: int, message: str) -> None:
    answer = httpx.post(f"{client.base_url}{path}", content=b"{")
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_a_checkpoint_without_chat_template_says_so(tmp_path) -> None:
    with running(open_served(saved(tmp_path / "plain", chat=False), None, None)) as client:
        with pytest.raises(openai.BadRequestError, match="'plain' has no chat template; use /v1/completions"):
            client.chat.completions.create(model="plain", messages=MESSAGES)
        assert client.completions.create(model="plain", prompt="a", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("empty", [{"stop": []}, {"logit_bias": {}}, {"n": 1.0}, {"logprobs": False}])
def test_what_is_empty_or_neutral_asks_for_nothing(client, empty: dict) -> None:
    asked = {"model": "tiny", "max_tokens": 2, "extra_body": empty}
    assert client.completions.create(prompt="a", **asked).usage.completion_tokens == 2
    assert client.chat.completions.create(messages=MESSAGES, **asked).usage.completion_tokens == 2


def test_messages_of_openais_client_may_say_that_they_call_no_tools(client) -> None:
    said = {"role": "assistant", "content": "a", "tool_calls": None, "function_call": None}
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    found = [
        client.chat.completions.create(messages=[*MESSAGES, each], **asked).choices[0].message.content
        for each in (said, {"role": "assistant", "content": "a"})
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-44, 1e-300])
def test_the_coldest_temperatures_are_the_greedy_choice(client, temperature: float) -> None:
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 8}
    cold, greedy = (client.completions.create(**asked, temperature=each).choices[0].text for each in (temperature, 0))
    assert cold == greedy


@pytest.mark.parametrize("function", [{"name": "f", "arguments": "{bad"}, {}, {"name": "f", "arguments": "[1]"}])
def test_tool_calls_without_an_object_as_arguments_are_refused(client, function: dict) -> None:
    call = {"id": "1", "type": "function", "function": function}
    asked = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="expected tool_calls with a name and a JSON object"):
        client.chat.completions.create(model="tiny", messages=asked, max_tokens=2)
