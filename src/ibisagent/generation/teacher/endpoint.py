"""A teacher behind any OpenAI-compatible chat server: images in, one JSON field out, every reply kept and paid once.

Replies are kept in a folder under the hash of what was asked (model, settings, text, pixels), so a stopped run asks
nothing twice. The server sees what a student sees, the right action and the error as text; it never sees a mask of
the ground truth.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from ibisagent.domain import Box, Click, Undo
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.files import make_folder, one_line, write_whole
from ibisagent.generation.config import EndpointConfig
from ibisagent.generation.teacher.base import Refusal, Thought
from ibisagent.generation.teacher.visual_facts import TeacherContext, VisualFacts
from ibisagent.policies.endpoint import png_data_url
from ibisagent.protocol import overlay

PROMPT_TOKENS = 450
"""Text of one request, for estimates."""

SYSTEM = (
    "You write the inner thoughts of an agent that segments biomedical images by clicking. You see the picture as the "
    "agent sees it, with its current mask in colour, the question, the action that the agent takes now, and a hint of "
    "why it is right. Write what the agent could have thought from the picture alone, in one to three sentences, first "
    "person, present tense, ending with the intention to do this action. Never mention a hint, an instruction, truth, "
    "annotations, scores, percentages, numbers or coordinates. Say sides as the hint does. "
    'Answer in JSON: {"thought": "..."}'
)
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "thought",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"thought": {"type": "string"}},
            "required": ["thought"],
            "additionalProperties": False,
        },
    },
}


class EndpointTeacher:
    """The teacher. `counts` says how often what happened: asked, cached, retried, and every refusal by its reason."""

    def __init__(self, settings: EndpointConfig, cache: Path, seed: int = 0) -> None:
        """cache: folder of the replies and of what they cost. The key is read from IBIS_API_KEY."""
        if not settings.url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint url '{settings.url}': give one that begins with http")
        self.name = f"endpoint:{settings.model}"
        self.counts: Counter[str] = Counter()
        self._settings, self._cache, self._seed = settings, cache, seed
        self._client = openai.OpenAI(
            base_url=settings.url,
            api_key=os.environ.get("IBIS_API_KEY") or "none",
            timeout=settings.timeout_seconds,
            max_retries=0,
        )
        self._lock = threading.Lock()
        self._next_start = 0.0
        make_folder(cache)
        self._spent: float = sum(float(self._read(path).get("price", 0.0)) for path in sorted(cache.glob("*.json")))
        self._reserved = 0.0

    @property
    def spent(self) -> float:
        """What all kept replies have cost, those of earlier runs included."""
        return self._spent

    def think(self, contexts: Sequence[TeacherContext]) -> list[Thought]:
        """One thought or refusal for each context, in order.

        PolicyError when the budget does not allow another request or the server cannot be used at all; what was paid
        for is kept then, and the next start resumes from there.
        """
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            asked = [pool.submit(self._thought, context) for context in contexts]
            try:
                return [answer.result() for answer in asked]
            except PolicyError:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _thought(self, context: TeacherContext) -> Thought:
        messages = self._messages(context)
        settings = self._settings
        request: dict[str, Any] = {
            "model": settings.model,
            "messages": messages,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "seed": self._seed,
        }
        if settings.structured:
            request["response_format"] = _SCHEMA
        content = json.dumps([settings.url, context.key, request], sort_keys=True, ensure_ascii=False)
        path = self._cache / f"{hashlib.sha256(content.encode('utf-8', 'surrogateescape')).hexdigest()}.json"
        if path.exists():
            self._count("cached")
            kept = _thought_in(self._read(path)["text"])
            if isinstance(kept, Refusal):
                self._count(kept.reason)
            return kept
        return self._ask(request, path)

    def _ask(self, request: dict[str, Any], path: Path) -> Thought:
        """Ask until there is a usable reply, at most `retries` times more; what is paid is accounted for."""
        settings = self._settings
        paid = 0.0
        refusal = Refusal("no reply")
        for attempt in range(settings.retries + 1):
            if attempt:
                self._count("retried")
                pause = settings.pause_seconds * 2 ** (attempt - 1)
                time.sleep(pause * random.uniform(0.75, 1.25))
            reserved = self._reserve()
            self._wait_for_turn()
            try:
                self._count("asked")
                answer = self._client.chat.completions.create(**request)
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                refusal = Refusal(_reason(error), one_line(error, 200))
                continue
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise PolicyError(
                    f"{settings.url}: cannot be used ({one_line(error, 200)}); check key, model and URL"
                ) from error
            except openai.APIStatusError as error:  # refused images, content filters: asking again does not help
                refusal = Refusal("refused", one_line(error, 200))
                break
            except (openai.OpenAIError, ValueError) as error:
                refusal = Refusal("malformed reply", one_line(error, 200))
                continue
            finally:
                self._release(reserved)
            price = self._price(answer.usage)
            with self._lock:
                self._spent += price
            paid += price
            message = answer.choices[0].message if answer.choices else None
            text = (message.content or "") if message is not None else ""
            if message is not None and getattr(message, "refusal", None):
                refusal = Refusal("refused", str(message.refusal)[:160])
                self._keep(path, json.dumps({"refusal": str(message.refusal)}), paid)
                break
            thought = _thought_in(text)
            if isinstance(thought, str):
                self._keep(path, text, paid)
                return thought
            refusal = thought
        else:
            if paid:
                self._keep(path, text, paid)
        self._count(refusal.reason)
        return refusal

    def _messages(self, context: TeacherContext) -> list[dict[str, Any]]:
        lines = [
            f"Question: {context.query}",
            f"Modality: {context.modality or 'unknown'}",
            f"Action: {'; '.join(_action_words(context)) or 'stop'}",
            f"Hint: {'; '.join(map(_hint, context.visuals)) or 'the question can be answered in words'}",
        ]
        parts: list[dict[str, Any]] = [{"type": "text", "text": "\n".join(lines)}]
        if self._settings.images:
            url = png_data_url(overlay(context.image, context.masks, "colour"))
            parts.append({"type": "image_url", "image_url": {"url": url}})
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}]

    def _estimate(self) -> float:
        settings = self._settings
        tokens = PROMPT_TOKENS + (settings.tokens_per_image if settings.images else 0)
        return (tokens * settings.price_in + settings.max_tokens * settings.price_out) / 1e6

    def _reserve(self) -> float:
        """Set aside what a request may cost; PolicyError if the budget does not hold that much."""
        price = self._estimate()
        budget = self._settings.budget
        with self._lock:
            if budget is not None and self._spent + self._reserved + price > budget:
                raise PolicyError(
                    f"the teacher's budget of {budget:g} is used up ({self._spent:.4g} spent): raise 'budget' and start"
                    " again, nothing is asked twice"
                )
            self._reserved += price
        return price

    def _release(self, reserved: float) -> None:
        with self._lock:
            self._reserved -= reserved

    def _price(self, usage: Any) -> float:
        if usage is None:
            return self._estimate()
        settings = self._settings
        return float(usage.prompt_tokens * settings.price_in + usage.completion_tokens * settings.price_out) / 1e6

    def _wait_for_turn(self) -> None:
        if not self._settings.requests_per_minute:
            return
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 60 / self._settings.requests_per_minute
        time.sleep(max(0.0, start - time.monotonic()))

    def _keep(self, path: Path, text: str, price: float) -> None:
        write_whole(json.dumps({"text": text, "price": price}, ensure_ascii=False).encode(), path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: is damaged ({error}); delete it, it will be asked again") from error
        return kept

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def _thought_in(text: str) -> Thought:
    """The thought in a reply that should be JSON with that one field."""
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Refusal("malformed reply", text[:160])
    if isinstance(value, dict) and "refusal" in value:
        return Refusal("refused", str(value["refusal"])[:160])
    thought = value.get("thought") if isinstance(value, dict) else None
    if not isinstance(thought, str) or not thought.strip():
        return Refusal("malformed reply", text[:160])
    return " ".join(thought.split())


def _reason(error: openai.APIError) -> str:
    if isinstance(error, openai.RateLimitError):
        return "rate limit"
    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    return "no connection" if isinstance(error, openai.APIConnectionError) else "server error"


def _action_words(context: TeacherContext) -> list[str]:
    """The actions without their coordinates."""
    words = []
    for action in context.reply.actions:
        if isinstance(action, Click):
            words.append(f"a {'positive' if action.positive else 'negative'} click for the {action.target}")
        elif isinstance(action, Box):
            words.append(f"a box around the {action.target}")
        elif isinstance(action, Undo):
            words.append("take the last action back (undo)")
        else:
            words.append(f"stop, with the answer: {action.answer}")
    return words


def _hint(visual: VisualFacts) -> str:
    """What was measured, in plain words."""
    what = {
        "first": f"nothing is marked yet; the {visual.name} is to be found",
        "missed": f"the mask misses {visual.extent or 'a part'} of the {visual.name}",
        "leaked": f"the mask covers {visual.extent or 'a part'} that is not the {visual.name}",
        "wrong": f"a plausible mistake about the {visual.name}",
        "undo": f"the last action did harm to the mask of the {visual.name}",
        "done": f"the mask of the {visual.name} fits",
        "absent": f"there is no {visual.name} here",
        "unrelated": f"the mask that the user gave is not of the {visual.name}; discard it and begin again",
        "claim": f"the user named the wrong side of the {visual.name}",
    }[visual.turn_kind]
    more = [word for word in (visual.side, visual.place, visual.shape) if word]
    more += [f"{visual.tone} than its surroundings"] if visual.tone else []
    more += [{"alike": "as bright as the rest"}.get(visual.contrast, f"{visual.contrast} than the rest")] * bool(
        visual.contrast
    )
    return ", ".join([what, *more])
