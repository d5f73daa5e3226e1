"""A server in a thread of the test, on a free port, and OpenAI's client of it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import torch
import uvicorn

import saap
from saap.serving.server import bound
from saap.serving.server_app import Served, build_app
from tests.saap.test_checkpoint import make_plan
from tests.saap.tiny import tiny_model, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ message['role'] }} {{ message['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


CONTEXT = 512  # room for answers that last long enough to leave in the middle
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what now"}]
ASGI = {  # the scope of a POST, but for its path
    "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
    "query_string": b"", "headers": [], "scheme": "http", "server": ("test", 80), "client": ("test", 1),
    "root_path": "",
}  # fmt: skip


def saved(folder, family: str = "llama", chat: bool = True, **overrides):
    """A pruned model whose layers differ, without an end token, so that answers have the length asked for."""
    model = tiny_model(family, torch.float32, max_position_embeddings=CONTEXT, **overrides)
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    saap.save(saap.compact(model, make_plan(model)), folder, tokenizer=tokenizer)
    return folder


@contextmanager
def running(served: Served) -> Iterator[openai.OpenAI]:
    with bound("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(served), log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        try:
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(holds, seconds: float = 20.0) -> None:
    """Wait for ``holds``; the bound is far above what an idle machine needs."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
