"""transformers' sequential generation, with what OpenAI's clients rely on and it lacks.

That is: requests that fit the context or are refused, texts that end before their stop sequence, a seed that only
counts for its own request, and requests whose client is gone, which end.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cli.serving.utils import GenerateManager, GenerationState

from saap.serving.server_body import Refused
from saap.serving.server_requests import ASKED, CHAT, DEFAULT_TOKENS

COLDEST = 1e-5  # temperatures below it are the greedy choice: fp32 scores divided by less can overflow


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens of prompt and answer together; None where the configuration states no bound."""
    return getattr(config, "max_position_embeddings", None)


def adjust(config: GenerationConfig, model_config: GenerationConfig) -> GenerationConfig:
    """Sampling as OpenAI means it, on a generation config that transformers' handler made from the request.

    A temperature or top_p asks for sampling, a temperature below COLDEST for the greedy choice; without both the
    model's own generation config decides. ``top_k`` is not in OpenAI's API: only the model's
    own limits the choice, not transformers' 50.
    """
    asked = ASKED.get()
    temperature, top_p = asked.body.get("temperature"), asked.body.get("top_p")
    if temperature is not None and temperature < COLDEST:
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    elif temperature is not None or top_p is not None:
        config.do_sample = True
    if config.do_sample and model_config.top_k is None:
        config.top_k = 0
    if biases := asked.body.get("logit_bias"):
        config.sequence_bias = {(int(token),): float(bias) for token, bias in biases.items()}
    if asked.stop:
        config.stop_strings = None  # ``StopTexts`` looks for them
    config.num_beams, config.num_return_sequences = 1, 1  # beams cannot be streamed
    config.max_length = config.min_length = None  # only max_new_tokens counts
    return config


def fit(config: GenerationConfig, prompt: int, model: PreTrainedModel) -> None:
    """Set ``max_new_tokens`` of the request behind a prompt of so many tokens; Refused beyond the context."""
    asked, limit = ASKED.get(), context_length(model.config)
    if prompt == 0:
        raise Refused("the prompt has no tokens", "messages" if asked.kind == CHAT else "prompt")
    left = None if limit is None else limit - prompt
    tokens = DEFAULT_TOKENS[asked.kind] if asked.tokens is None else asked.tokens
    if left is not None and left < (1 if asked.tokens is None else tokens):
        wanted = "" if asked.tokens is None else f" and max_tokens {tokens}"
        raise Refused(
            f"this model's context is {limit} tokens; the prompt has {prompt}{wanted}",
            "messages" if asked.kind == CHAT else "prompt",
            code="context_length_exceeded",
        )
    config.max_new_tokens = tokens if left is None else min(tokens, left)
    too_large = [token for (token,) in config.sequence_bias or () if token >= model.config.vocab_size]
    if too_large:
        raise Refused(f"logit_bias: the model has no token {too_large[0]}", "logit_bias")


class Cancelled(StoppingCriteria):
    """Ends a generation at the next token once ``event`` is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


class StopTexts(StoppingCriteria):
    """Ends a generation at its stop sequences; those that the tokenizer has no tokens for never come."""

    def __init__(self, processor: Any, stops: tuple[str, ...]) -> None:
        self._processor, self._stops = processor, stops
        self._known: list[StopStringCriteria] | None = None  # slow to make: not before the generation, in its thread

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        if self._known is None:
            self._known = self._made(self._stops)
        found = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self._known:
            found = found | criterion(input_ids, scores, **more)
        return found

    def _made(self, stops: tuple[str, ...]) -> list[StopStringCriteria]:
        try:
            return [StopStringCriteria(self._processor, list(stops))]
        except ValueError:  # of all together, for the sake of one
            return [each for stop in stops for each in self._made((stop,))] if len(stops) > 1 else []


class Generation(GenerateManager):
    """One model's generation, one request after another, on one thread."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = model

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return super().submit(self._for_request(fn), *args, **kwargs)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # the thread sets the result of a future that a client who left must not have cancelled
        return asyncio.shield(super().async_submit(self._for_request(fn), *args, **kwargs))

    def _for_request(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` with the request's seed, and not at all where its client left while others were answered."""
        asked = ASKED.get()

        def run(*args: Any, **kwargs: Any) -> Any:
            if asked.gone.is_set():
                return None
            if asked.seed is None:
                return fn(*args, **kwargs)
            devices = [self._model.device] if self._model.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # the next request without a seed is drawn anew
                torch.manual_seed(asked.seed)
                return fn(*args, **kwargs)

        return run

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        **more: Any,
    ) -> Any:
        fit(gen_config, inputs["input_ids"].shape[-1], model)
        inputs = {**inputs, "stopping_criteria": _criteria(processor)}
        return super().generate_streaming(model, processor, inputs, gen_config, **more)

    async def generate_non_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        **more: Any,
    ) -> Any:
        fit(gen_config, inputs["input_ids"].shape[-1], model)
        inputs = {**inputs, "stopping_criteria": _criteria(processor)}
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, **more)
        except asyncio.CancelledError:
            ASKED.get().gone.set()
            raise


def _criteria(processor: Any) -> StoppingCriteriaList:
    """What ends the generation of the request before its last token."""
    asked = ASKED.get()
    gone = Cancelled(asked.gone)
    return StoppingCriteriaList([gone, StopTexts(processor, asked.stop)] if asked.stop else [gone])


class OneModel(GenerationState):
    """transformers' generation state of a server that has one model and never another."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._only = Generation(model)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._only


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop sequence."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """``text`` up to the first stop sequence."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
