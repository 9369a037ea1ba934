"""An OpenAI-compatible chat server around one of our models, so that anything that speaks that protocol can ask it.

`GET /v1/models` and `POST /v1/chat/completions`, without streaming; images come as data URLs (PNG, JPEG, WebP).
The server never fetches a URL and never opens a file for a client. Requests are answered one after the other: for
many users put a large model behind vLLM instead. Errors have OpenAI's shape, {"error": {"message", "type", "code"}}.
"""

from __future__ import annotations

import base64
import re
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.files import one_line
from ibisagent.imaging.images import decode_image
from ibisagent.server.auth import AuthMiddleware, Keys, token_for
from ibisagent.server.listening import listen

if TYPE_CHECKING:
    import PIL.Image

    from ibisagent.policies.mllm import MllmPolicy
    from ibisagent.protocol import Message

MAX_BODY_BYTES = 64 * 2**20


class _Strict(BaseModel):
    """Unknown fields are refused: a setting that would be ignored must not look as if it had worked."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    """An image as "data:image/png;base64,..."; `detail` changes nothing here."""

    url: str
    detail: str = "auto"


class TextPart(_Strict):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Strict):
    """One message of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class ChatRequest(_Strict):
    """Body of a chat completion request: what of OpenAI's protocol this server honours, and nothing else."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    seed: int | None = None
    n: Literal[1] = 1
    stream: Literal[False] = False
    user: str | None = None


def create_app(policy: MllmPolicy, *, model: str | None = None, token: str | None = None) -> FastAPI:
    """The application that serves `policy` under the name `model` (its own name where None).

    token: what a client must send as "Authorization: Bearer <token>" (OpenAI clients: their API key); without one only
    requests addressed to this machine's loopback names are answered.
    """
    app = FastAPI(title="ibisagent chat", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(HTTPException, _openai_error)
    card = {
        "id": model or policy.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "ibisagent",
        "dialect": policy.dialect,
        "history": policy.history,
        "mask_style": policy.style,
    }

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict[str, Any]:
        asked = _parse(await request.body())
        if asked.model != card["id"]:
            raise HTTPException(404, f"no model '{asked.model}' here: ask for '{card['id']}'")
        return await run_in_threadpool(_complete, policy, asked)

    app.add_middleware(AuthMiddleware, keys=Keys(token), max_body=MAX_BODY_BYTES, refuse=_openai_refusal)
    return app


def serve(policy: MllmPolicy, *, host: str = "127.0.0.1", port: int = 8000, model: str | None = None) -> None:
    """Serve until interrupted; the token comes from IBIS_TOKEN. ConfigError without one, unless `host` is loopback."""
    listen(create_app(policy, model=model, token=token_for(host)), host, port)


async def _openai_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    return _openai_refusal(error.status_code, error.detail)


def _openai_refusal(status: int, reason: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": reason, "type": kind, "code": status}}, status_code=status)


def _parse(body: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise HTTPException(400, f"{where}: {first['msg']}") from error


def _complete(policy: MllmPolicy, asked: ChatRequest) -> dict[str, Any]:
    try:
        [written] = policy.generate(
            [[_as_message(message) for message in asked.messages]],
            max_new_tokens=asked.max_completion_tokens or asked.max_tokens,
            temperature=asked.temperature,
            seed=asked.seed,
        )
    except (ConfigError, DataError) as error:
        raise HTTPException(400, str(error)) from error
    except PolicyError as error:
        raise HTTPException(500, str(error)) from error
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": written.text},
                "finish_reason": "stop" if written.finished else "length",
            }
        ],
        "usage": {
            "prompt_tokens": written.prompt_tokens,
            "completion_tokens": written.tokens,
            "total_tokens": written.prompt_tokens + written.tokens,
        },
    }


def _as_message(message: ChatMessage) -> Message:
    if isinstance(message.content, str):
        return {"role": message.role, "content": [{"type": "text", "text": message.content}]}
    content: list[dict[str, Any]] = [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": _image(part.image_url.url)}
        for part in message.content
    ]
    return {"role": message.role, "content": content}


def _image(url: str) -> PIL.Image.Image:
    head, _, payload = url.partition(",")
    if not re.fullmatch(r"data:image/(png|jpeg|webp);base64", head):
        raise DataError("image_url: send the image itself, as data:image/png;base64,... (also jpeg, webp)")
    try:
        content = base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise DataError(f"image_url: is not base64 ({one_line(error)}); encode it again") from error
    return decode_image(content, "image_url", ("PNG", "JPEG", "WEBP"))
