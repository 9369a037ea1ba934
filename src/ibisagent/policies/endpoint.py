"""A policy behind any OpenAI-compatible chat server: vLLM, `transformers serve`, `server.policy_server`, a cloud."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletionMessage
from PIL.Image import Image as PillowImage

from ibisagent.domain import Completion, Observation
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.files import one_line, png_bytes
from ibisagent.policies.base import MAX_NEW_TOKENS, is_public
from ibisagent.policies.wording import read_wording, wording_facts
from ibisagent.protocol import History, Message, OverlayStyle, dialect_of, render

PLAIN_SAMPLING: Mapping[str, Any] = MappingProxyType(
    {"top_p": 1.0, "extra_body": {"repetition_penalty": 1.0, "top_k": -1}}
)
"""What overrules the sampling settings in a folder of weights, which vLLM takes for its defaults."""


class EndpointPolicy:
    """Asks a chat server, multiple observations at once; images travel as PNG data URLs.

    url: the server's base, usually ending in /v1. model: its name there; "" takes the only one on offer. The key is
    read from the environment variable IBIS_API_KEY. dialect, history, style: None takes what the server says of the
    model (ours does, in /models), else "released" for the paper authors' own weights, by their name or the folder that
    vLLM says they come from, "ibis" for any other, with that dialect's own history and style. The authors' weights are
    sampled plainly, whatever their folder's own settings are. prompts: as for `MllmPolicy`. concurrency: requests
    under way at once. timeout_seconds, retries: per request; 429, 5xx and lost connections are tried again, each time
    after a longer pause. seed: passed on; whether it is honoured is up to the server.

    Raises ConfigError for a URL, model or dialect that cannot be, PolicyError when the server cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        dialect: str | None = None,
        history: History | None = None,
        style: OverlayStyle | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        concurrency: int = 16,
        timeout_seconds: float = 120.0,
        retries: int = 4,
        prompts: str | Path | None = None,
    ) -> None:
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(f"endpoint '{url}': give endpoint:<base url>#<model>, the URL beginning with http")
        max_new_tokens = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        if concurrency < 1 or max_new_tokens < 1 or temperature < 0:
            raise ConfigError("endpoint: concurrency and max_new_tokens must be 1 or more, temperature 0 or more")
        self._url = url
        self._client = openai.OpenAI(
            base_url=url, api_key=os.environ.get("IBIS_API_KEY") or "none", timeout=timeout_seconds, max_retries=retries
        )
        self._concurrency = concurrency
        self._settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}

        offered = self._offered()
        if not model and len(offered) != 1:
            raise ConfigError(f"endpoint {url}: name the model after '#': {', '.join(offered) or 'it lists none'}")
        self._model = model or next(iter(offered))
        facts = offered.get(self._model, {})
        self.name = f"endpoint:{url}#{self._model}"
        public = is_public(self._model) or is_public(str(facts.get("root", "")))
        if public:
            self._settings |= PLAIN_SAMPLING
        self.wording = None if prompts is None else read_wording(prompts)
        self.dialect: str = dialect or facts.get("dialect") or ("released" if public else "ibis")
        default = dialect_of(self.dialect)
        self.history: History = history or facts.get("history") or default.history
        self.style: OverlayStyle = style or facts.get("mask_style") or default.style

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """One completion per observation, in order; `seconds` is what that request took, waiting included."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            asked = [pool.submit(self._ask, observation) for observation in observations]
            try:
                return [answer.result() for answer in asked]
            except PolicyError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def describe(self) -> dict[str, str]:
        """What a record needs to name this policy; which weights answer is known to the server alone."""
        flat = {**self._settings, **self._settings.get("extra_body", {})}
        flat.pop("extra_body", None)
        settings = {key.replace("max_tokens", "max_new_tokens"): str(value) for key, value in flat.items()}
        said = wording_facts(self.dialect, self.wording)
        return {"policy": self.name, "dialect": self.dialect, "history": self.history, **said, **settings}

    def _offered(self) -> dict[str, dict[str, Any]]:
        """Facts by model name, as the server lists them; none where it has no list (some fail to make one)."""
        client = self._client.with_options(max_retries=1, timeout=10.0)  # so that a wrong URL is told at once
        try:
            return {model.id: model.model_extra or {} for model in client.models.list()}
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._explained(error) from error
        except openai.APIError:
            return {}

    def _ask(self, observation: Observation) -> Completion:
        messages = render(
            observation, dialect=self.dialect, history=self.history, style=self.style, wording=self.wording
        )
        started = time.perf_counter()
        try:
            answer = self._client.chat.completions.create(
                model=self._model, messages=[_as_openai(message) for message in messages], **self._settings
            )
        except openai.OpenAIError as error:
            raise self._explained(error) from error
        if not answer.choices:
            raise PolicyError(f"{self._url}: answered without a choice; is it an OpenAI-compatible chat server?")
        tokens = answer.usage.completion_tokens if answer.usage else None
        return Completion(_written(answer.choices[0].message), tokens, time.perf_counter() - started)

    def _explained(self, error: openai.OpenAIError) -> PolicyError:
        """One line: the URL, what happened, what to do."""
        reason = one_line(error, 300)
        match error:
            case openai.APITimeoutError():
                remedy = "no answer in time; lower the batch size or raise timeout_seconds"
            case openai.APIConnectionError():
                remedy = f"cannot be reached ({error.__cause__ or reason}); start the server or check the URL"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                remedy = "refuses the key; set the environment variable IBIS_API_KEY"
            case openai.NotFoundError():
                remedy = f"has no such address or model ({reason}); check the model's name and that the URL ends in /v1"
            case _:
                remedy = f"failed ({reason})"
        return PolicyError(f"{self._url}: {remedy}")


def _written(message: ChatCompletionMessage) -> str:
    """What the model wrote. Some servers cut the thought out (`transformers serve`, vLLM's reasoning parsers)."""
    text, extra = message.content or "", message.model_extra or {}
    thought = extra.get("reasoning_content") or extra.get("reasoning")
    return f"<think>{thought}</think>{text}" if isinstance(thought, str) and "<think>" not in text else text


def _as_openai(message: Message) -> Any:
    """`message` with its images as data URLs."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_part_as_openai(part) for part in message["content"]]}


def _part_as_openai(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    return {"type": "image_url", "image_url": {"url": png_data_url(part["image"])}}


def png_data_url(image: PillowImage) -> str:
    """`image` as "data:image/png;base64,...", lossless, alpha kept."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")
