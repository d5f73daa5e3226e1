"""What ``saap serve`` refuses, in the form that OpenAI's client reads, and that it goes on afterwards."""

import httpx
import openai
import pytest

from saap.serving.server import open_served
from tests.serving.running import CONTEXT, MESSAGES, running, saved


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


def test_an_empty_list_of_stops_asks_for_nothing(client) -> None:
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2, stop=[]).usage.completion_tokens == 2


@pytest.mark.parametrize("function", [{"name": "f", "arguments": "{bad"}, {}, {"name": "f", "arguments": "[1]"}])
def test_tool_calls_without_an_object_as_arguments_are_refused(client, function: dict) -> None:
    call = {"id": "1", "type": "function", "function": function}
    asked = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="expected tool_calls with a name and a JSON object"):
        client.chat.completions.create(model="tiny", messages=asked, max_tokens=2)
