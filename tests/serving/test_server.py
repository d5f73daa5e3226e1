"""``saap serve`` asked by OpenAI's own client: answers, streams, refusals, and clients that leave."""

import asyncio
import json
import threading

import httpx
import openai
import pytest
import torch
from transformers.cli.serving.utils import get_response_template

import saap
from saap.serving.server import described, open_served
from saap.serving.server_app import Served, build_app
from tests.saap.tiny import FAMILIES, tiny_model, tiny_tokenizer
from tests.serving.running import ASGI, CONTEXT, MESSAGES, running, saved


def greedy(served: Served, ids: torch.Tensor, tokens: int) -> str:
    mask = torch.ones_like(ids)  # else the first token is taken for padding where both are 0
    found = served.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return served.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def of_prompt(served: Served, prompt: str) -> torch.Tensor:
    return served.tokenizer(prompt, return_tensors="pt")["input_ids"]


def of_chat(served: Served) -> torch.Tensor:
    return served.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def test_a_quantised_model_has_the_parameters_that_its_weights_stand_for() -> None:
    model = tiny_model("llama", torch.float32)
    whole = f"LlamaForCausalLM, {model.num_parameters():,} parameters, float32 on cpu"
    assert described(model) == described(saap.quantise(model, bits=4)) == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(tmp_path, family: str) -> None:
    served = open_served(saved(tmp_path / family, family), None, None)
    with running(served) as client:
        found = client.completions.create(model=family, prompt="the fox", max_tokens=12, temperature=0)
        chat = client.chat.completions.create(model=family, messages=MESSAGES, max_tokens=12, temperature=0)
    ids = of_prompt(served, "the fox")
    assert found.choices[0].text == greedy(served, ids, 12) and found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (ids.shape[1], 12)
    assert chat.choices[0].message.content == greedy(served, of_chat(served), 12)
    assert chat.choices[0].message.role == "assistant" and chat.model == family
    assert (chat.usage.prompt_tokens, chat.usage.total_tokens) == (
        of_chat(served).shape[1],
        of_chat(served).shape[1] + 12,
    )


def test_models_and_health(served, client) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == CONTEXT
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist: this server has 'tiny'"):
        client.models.retrieve("other")
    assert httpx.get(f"{client.base_url}../health").json() == {"status": "ok"}


@pytest.mark.parametrize("usage", [False, True])
def test_streams_hold_the_same_text_and_usage_where_it_is_asked_for(served, client, usage: bool) -> None:
    asked = {"model": "tiny", "max_tokens": 20, "temperature": 0, "stream": True}
    asked |= {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.completions.create(prompt="the fox", **asked))
    chat = list(client.chat.completions.create(messages=MESSAGES, **asked))
    if usage:
        for end, ids in ((chunks.pop(), of_prompt(served, "the fox")), (chat.pop(), of_chat(served))):
            assert end.choices == [] and end.usage.completion_tokens == 20
            assert end.usage.prompt_tokens == ids.shape[1] and end.usage.total_tokens == ids.shape[1] + 20
    assert all(chunk.usage is None for chunk in chunks + chat)
    assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(served, of_prompt(served, "the fox"), 20)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chat)
    assert told == greedy(served, of_chat(served), 20)
    assert chat[0].choices[0].delta.role == "assistant" and len(chunks) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert chat[-1].choices[0].finish_reason == "length"


def test_a_stream_ends_as_openai_says(client) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{client.base_url}completions", json=body) as answer:
        events = answer.read().decode().split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_answers_end_before_a_stop_sequence(served, client, stream: bool, length: int) -> None:
    whole = greedy(served, of_prompt(served, "the fox"), 30)
    stop = whole[12 : 12 + length]
    want = whole[: whole.index(stop)]
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 30, "temperature": 0, "stop": ["~~", stop]}
    if stream:
        chunks = list(client.completions.create(**asked, stream=True))
        text, end = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        (choice,) = client.completions.create(**asked).choices
        text, end = choice.text, choice.finish_reason
    assert (text, end) == (want, "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("strange", ["\U0001d7d8", "a\0"])
def test_a_stop_sequence_that_no_token_makes_never_comes(served, client, stream: bool, strange: str) -> None:
    whole = greedy(served, of_prompt(served, "the fox"), 30)
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 30, "temperature": 0, "stream": stream}
    for stop, want in (([strange], whole), ([strange, whole[12:15]], whole[: whole.index(whole[12:15])])):
        found = client.completions.create(**asked, stop=stop)
        text = "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text
        assert text == want


def test_chat_answers_end_before_a_stop_sequence(served, client) -> None:
    whole = greedy(served, of_chat(served), 30)
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "temperature": 0, "stop": whole[10:12]}
    want = whole[: whole.index(whole[10:12])]
    assert client.chat.completions.create(**asked).choices[0].message.content == want
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want


def test_a_seed_repeats_an_answer_and_only_its_own(client) -> None:
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 30, "temperature": 1.5}

    def answer(**more) -> str:
        return client.completions.create(**asked, **more).choices[0].text

    first, other = answer(seed=1), answer(seed=2)
    assert first == answer(seed=1) != other
    assert answer() != answer()  # and those without are not repeated by the seeds of others
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, seed=1, stream=True))
    assert streamed == first


def test_a_temperature_samples_from_all_tokens_and_zero_does_not(served, client) -> None:
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 1}
    hot = {client.completions.create(**asked, temperature=2, seed=seed).choices[0].text for seed in range(60)}
    cold = {client.completions.create(**asked, temperature=0, seed=seed).choices[0].text for seed in range(3)}
    assert len(hot) > 10 and len(cold) == 1
    biased = client.completions.create(**asked, temperature=0, logit_bias={"5": 100})
    assert biased.choices[0].text == served.tokenizer.decode([5])


def test_tokens_that_are_not_asked_for_are_openais_default_and_fit_the_context(served, client) -> None:
    assert client.completions.create(model="tiny", prompt="a").usage.completion_tokens == 16
    close = client.completions.create(model="tiny", prompt="a" * (CONTEXT - 5)).usage
    assert close.total_tokens == CONTEXT
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=5).usage
    assert chat.completion_tokens == 5


def test_text_in_parts_is_text(served, client) -> None:
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    assert client.chat.completions.create(messages=parts, **asked).choices[0].message.content == greedy(
        served, of_chat(served), 8
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_who_leaves_ends_the_generation(served, client, stream: bool) -> None:
    steps, started, tokens = [0], threading.Event(), CONTEXT - 5

    def count(*_) -> None:
        steps[0] += 1
        started.set()

    hook = served.model.register_forward_pre_hook(count)
    body = {"model": "tiny", "prompt": "a", "max_tokens": tokens, "stream": stream}
    try:
        if stream:
            with httpx.stream("POST", f"{client.base_url}completions", json=body) as answer:
                next(answer.iter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{client.base_url}completions", json=body, timeout=httpx.Timeout(5, read=0.1))
        assert started.wait(20)
        # one thread generates: the next answer comes when the one that nobody waits for has ended
        assert client.completions.create(model="tiny", prompt="b", max_tokens=2).usage.completion_tokens == 2
        assert steps[0] < tokens
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("path", "asked"), [("completions", {"prompt": "a"}), ("chat/completions", {"messages": MESSAGES})]
)
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_gone_before_its_first_chunk_ends_the_generation(served, path: str, asked: dict, queued: bool) -> None:
    app, steps, room = build_app(served), [0], CONTEXT - 100

    async def leave() -> None:
        """Send a request and be gone as soon as it was read, while another is generated if ``queued``."""
        body = json.dumps(asked | {"max_tokens": room, "stream": True}).encode()
        sent, scope = iter([{"type": "http.request", "body": body, "more_body": False}]), ASGI | {"path": f"/v1/{path}"}

        async def receive() -> dict:
            return next(sent, {"type": "http.disconnect"})

        async def send(message: dict) -> None:
            await asyncio.sleep(0)  # as where the client reads slowly: nothing asked for a chunk yet

        await app(scope, receive, send)

    async def all_of_it() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test/v1/") as client:
            first = asyncio.create_task(client.post("completions", json={"prompt": "b", "max_tokens": 40}))
            while queued and not steps[0]:
                await asyncio.sleep(0.001)
            await leave()
            await first
            await client.post("completions", json={"prompt": "b", "max_tokens": 2})  # behind what nobody waits for

    hook = served.model.register_forward_pre_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    try:
        asyncio.run(all_of_it())
    finally:
        hook.remove()
    assert steps[0] == 42 if queued else 42 <= steps[0] < room


def test_an_error_while_streaming_reaches_the_client_whole(served, client) -> None:
    hook = served.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError('no "memory" left')))
    try:
        with pytest.raises(openai.APIError, match='no "memory" left'):
            list(client.completions.create(model="tiny", prompt="a", stream=True))
        with pytest.raises(openai.InternalServerError, match='RuntimeError: no "memory" left'):
            client.completions.create(model="tiny", prompt="a")
    finally:
        hook.remove()
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_requests_at_once_are_all_answered(served, client) -> None:
    want = {length: greedy(served, of_prompt(served, "fox " * length), 8) for length in range(1, 9)}
    found: dict[int, str] = {}

    def ask(length: int) -> None:
        asked = {"model": "tiny", "prompt": "fox " * length, "max_tokens": 8, "temperature": 0}
        if length % 2:
            found[length] = client.completions.create(**asked).choices[0].text
        else:
            found[length] = "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True))

    threads = [threading.Thread(target=ask, args=(length,)) for length in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == want


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_an_accelerated_model_is_served(tmp_path, bits: int | None) -> None:
    served = open_served(saved(tmp_path / "fast"), None, None, accelerate=True, bits=bits)
    assert str(served.model.saap_accelerated).startswith("MLP: ")
    with running(served) as client:
        found = client.completions.create(model="fast", prompt="the fox", max_tokens=8, temperature=0)
    assert found.choices[0].text == greedy(served, of_prompt(served, "the fox"), 8)


def test_what_is_served_is_json_of_openais_types(client) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
    found = httpx.post(f"{client.base_url}chat/completions", json=body).json()
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    openai.types.chat.ChatCompletion.model_validate(found)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    openai.types.Completion.model_validate(httpx.post(f"{client.base_url}completions", json=body).json())


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}<|im_start|>assistant\n"


@pytest.mark.parametrize(("family", "template"), [("qwen3", CHATML), ("qwen3", "{{ messages }}"), ("llama", CHATML)])
def test_tool_calls_and_reasoning_are_read_as_in_the_stock_model(tmp_path, family: str, template: str) -> None:
    served = open_served(saved(tmp_path / family, family), None, None)
    served.tokenizer.chat_template = template
    build_app(served)
    stock = get_response_template(tiny_tokenizer(), tiny_model(family, torch.float32))
    assert (stock is not None) is (family == "qwen3")
    assert get_response_template(served.tokenizer, served.model) == (stock if template == CHATML else None)
