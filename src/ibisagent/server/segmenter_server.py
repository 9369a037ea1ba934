"""Serves a segmenter to `remote` clients (the protocol is described in `segmenters.remote_schema`).

ibisagent serve segmenter -s sam2:facebook/sam2.1-hiera-tiny --port 8001
ibisagent segment image.png "optic disc" --segmenter remote:http://127.0.0.1:8001
"""

from __future__ import annotations

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from ibisagent.domain import Image
from ibisagent.errors import ConfigError, DataError, IbisError, SegmenterError
from ibisagent.imaging.images import decode_image
from ibisagent.segmenters import Segmenter
from ibisagent.segmenters.cache import EmbeddingCache
from ibisagent.segmenters.remote_schema import (
    ErrorReply,
    PredictReply,
    PredictRequest,
    decode_request,
    encode_prediction,
)
from ibisagent.server.auth import AuthMiddleware, Keys, token_for
from ibisagent.server.listening import listen

IMAGE_BYTES = 2**30  # of pixels kept open, least recently used dropped first
MAX_BODY_BYTES = 2**28


def create_app(segmenter: Segmenter, *, token: str | None = None, image_bytes: int = IMAGE_BYTES) -> FastAPI:
    """The application that serves `segmenter`.

    token: what a client must send as "Authorization: Bearer <token>"; without one only loopback names are answered.
    image_bytes: how many bytes of opened images are kept.
    """
    app = FastAPI(title="ibisagent segmenter", docs_url=None, redoc_url=None, openapi_url=None)
    opened = EmbeddingCache(image_bytes)

    def pixels_of(sha256: str) -> np.ndarray:
        def missing() -> tuple[np.ndarray]:
            raise HTTPException(404, f"image {sha256[:16]} is not open here: send it with PUT")

        return opened.fetch("image", sha256, missing)[0]

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(IbisError)
    async def failed(_request: Request, error: IbisError) -> JSONResponse:
        return _error(500 if isinstance(error, SegmenterError) else 400, str(error))

    @app.get("/v1/segmenter")
    def describe() -> dict[str, str]:
        return segmenter.describe()

    @app.get("/v1/images/{sha256}", status_code=204)
    def is_open(sha256: str) -> Response:
        pixels_of(sha256)
        return Response(status_code=204)

    @app.put("/v1/images/{sha256}", status_code=204)
    async def open_image(sha256: str, request: Request) -> Response:
        await run_in_threadpool(_open, segmenter, opened, sha256, await request.body())
        return Response(status_code=204)

    @app.post("/v1/predict")
    async def predict(request: Request) -> PredictReply:
        asked = _parse(await request.body())
        pixels = pixels_of(asked.image)
        return await run_in_threadpool(_predict, segmenter, pixels, asked)

    app.add_middleware(AuthMiddleware, keys=Keys(token), max_body=MAX_BODY_BYTES, refuse=_error)
    return app


def serve(segmenter: Segmenter, *, host: str = "127.0.0.1", port: int = 8001) -> None:
    """Serve until interrupted; the token comes from IBIS_TOKEN. ConfigError without one, unless `host` is loopback."""
    listen(create_app(segmenter, token=token_for(host)), host, port)


def _open(segmenter: Segmenter, opened: EmbeddingCache, sha256: str, png: bytes) -> None:
    """Decode, check against the name, embed (the segmenter caches that by content) and keep the pixels."""
    where = "the client's image"
    image = Image(np.array(decode_image(png, where, ("PNG",)).convert("RGB")), source=where)
    if image.sha256 != sha256:
        raise DataError(f"the image sent is not image {sha256[:16]}: it was altered on the way")
    segmenter.open(image)
    opened.fetch("image", sha256, lambda: (image.pixels,))


def _predict(segmenter: Segmenter, pixels: np.ndarray, asked: PredictRequest) -> PredictReply:
    prompts, prior = decode_request(asked)
    return encode_prediction(segmenter.open(Image(pixels)).predict(prompts, prior))


def _parse(body: bytes) -> PredictRequest:
    try:
        return PredictRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(str(part) for part in first['loc']) or 'body'}: {first['msg']}") from error


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(ErrorReply(error=message).model_dump(), status_code=status)
