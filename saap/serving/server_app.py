"""The routes of ``saap serve``: transformers' handlers of OpenAI's API around one model that is already loaded."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError  # which chat templates raise for roles and orders that they do not take
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseHandler, Modality, get_response_template

from saap.families import PRUNED_PREFIX
from saap.serving.server_body import Refused, read_body, shown
from saap.serving.server_generation import OneModel, adjust, context_length, cut
from saap.serving.server_requests import ASKED, CHAT, COMPLETION, Asked, check_request
from saap.serving.server_stream import openai_stream

GENERATION_ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
CLIENT_GONE = 499  # nginx's code; nobody is there to read it

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """The one model of a server: what clients call it, and the directory it came from."""

    name: str
    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def listed(self, created: int) -> dict[str, Any]:
        entry = {"id": self.name, "object": "model", "created": created, "owned_by": "saap"}
        return entry | {"max_model_len": context_length(self.model.config)}


class _Pinned(BaseHandler):
    """A handler of transformers that knows one model and gets checked requests."""

    served: Served

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Done: ``check_request`` refuses what this would only warn of."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
        return self.served.name, self.served.model, self.served.tokenizer

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        return adjust(config, model_generation_config)


class _Completions(_Pinned, CompletionHandler):
    pass


class _Chat(_Pinned, ChatCompletionHandler):
    pass


class _Stream(StreamingResponse):
    """A stream that ends its generation when it ends, even where no chunk of it was asked for.

    A generator that was never started is closed without a word to what it would have closed.
    """

    def __init__(self, answer: StreamingResponse, asked: Asked) -> None:
        super().__init__(openai_stream(answer.body_iterator, asked), media_type="text/event-stream")
        self._gone = asked.gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._gone.set()


def build_app(served: Served) -> FastAPI:
    """The FastAPI application that serves ``served`` and opens nothing that a request names."""
    app, created = FastAPI(title=f"SAAP: {served.name}"), int(time.time())
    # all that the handlers ask of transformers' model manager, which would load what a request names
    manager, state = SimpleNamespace(get_model_modality=lambda *_, **__: Modality.LLM), OneModel(served.model)
    handlers: dict[str, Any] = {COMPLETION: _Completions(manager, state), CHAT: _Chat(manager, state)}
    for handler in handlers.values():
        handler.served = served
    _read_answers_as_the_family(served)
    _answer_errors(app)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.listed(created)]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        if name != served.name:
            raise Refused(f"the model {shown(name)} does not exist: this server has {served.name!r}", "model", 404)
        return served.listed(created)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, handlers[COMPLETION], COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        if served.tokenizer.chat_template is None:
            raise Refused(f"{served.name!r} has no chat template; use /v1/completions", "messages")
        return await _answer(request, handlers[CHAT], CHAT)

    return app


def _read_answers_as_the_family(served: Served) -> None:
    """Find reasoning and tool calls in chat answers, whose form transformers knows by the stock model_type.

    Only where the chat template begins answers as that form does: otherwise the prompt would be read as answer.
    """
    stock = str(served.model.config.model_type).removeprefix(PRUNED_PREFIX)
    like = SimpleNamespace(config=SimpleNamespace(model_type=stock))
    form = get_response_template(served.tokenizer, like) or {}
    anchor, template = form.get("start_anchor"), served.tokenizer.chat_template
    if isinstance(anchor, str) and isinstance(template, str) and anchor.strip() in template:
        served.tokenizer.response_template = form


async def _answer(request: Request, handler: Any, kind: str) -> Response:
    """Check a request, let transformers' handler answer it, and bring the answer into OpenAI's form."""
    try:
        body = read_body(await request.body())
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    asked = check_request(body, kind, handler.served.name, handler.served.path)
    ASKED.set(asked)
    identity = ("chatcmpl-" if kind == CHAT else "cmpl-") + uuid.uuid4().hex
    answer = await _unless_gone(request, _handled(handler, asked, identity))
    if isinstance(answer, StreamingResponse):
        return _Stream(answer, asked)
    return _cut(answer, asked)


async def _handled(handler: Any, asked: Asked, identity: str) -> Response:
    try:
        return await handler.handle_request(dict(asked.body), identity)
    except TemplateError as error:
        raise Refused(f"the chat template refuses these messages: {error}", "messages") from error


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of ``work``, which is cancelled when the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else Response(status_code=CLIENT_GONE)
    finally:
        watch.cancel()
        task.cancel()


def _cut(answer: Response, asked: Asked) -> Response:
    """A whole answer up to its stop sequence: transformers includes it."""
    if not asked.stop:
        return answer
    found = json.loads(bytes(answer.body))
    for choice in found["choices"]:
        owner, name = (choice["message"], "content") if asked.kind == CHAT else (choice, "text")
        text = owner.get(name) or ""
        owner[name] = cut(text, asked.stop)
        if owner[name] != text:
            choice["finish_reason"] = "stop"
    return JSONResponse(found)


def _answer_errors(app: FastAPI) -> None:
    """Every error in the form that OpenAI's clients read."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return _error(str(error), error.status, error.field, error.code)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return _error(f"{request.method} {request.url.path}: {error.detail}", error.status_code)

    async def failed(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return _error(f"{type(error).__name__}: {error}", 500)

    for kind in GENERATION_ERRORS:  # a handler of Exception itself would close the connection behind the answer
        app.add_exception_handler(kind, failed)


def _error(message: str, status: int, field: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": field, "code": code}}, status)
