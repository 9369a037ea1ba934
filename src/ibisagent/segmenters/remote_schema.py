"""What `remote` and its server say to each other: JSON, masks as COCO run lengths, logits as float16 in base64.

- `GET /v1/segmenter`: facts about the segmenter (`Segmenter.describe`).
- `GET /v1/images/<sha256>`: 204 if the image is open there, else 404.
- `PUT /v1/images/<sha256>`: opens it; the body is the image as PNG, the name its `Image.sha256`.
- `POST /v1/predict`: `PredictRequest` -> `PredictReply`; 404 if the image is not open (any more).

Errors are `ErrorReply` with status 400 (ConfigError), 401, 404, 413 or 500 (SegmenterError).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ibisagent.domain import Box, Click, Prompt
from ibisagent.errors import DataError
from ibisagent.imaging.masks import decode_rle, encode_rle
from ibisagent.segmenters import Prediction

MAX_LOGIT = 6e4  # float16 ends at 65504


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ClickPrompt(_Strict):
    """A `Click`."""

    kind: Literal["click"] = "click"
    x: int
    y: int
    positive: bool
    target: str


class BoxPrompt(_Strict):
    """A `Box`."""

    kind: Literal["box"] = "box"
    x0: int
    y0: int
    x1: int
    y1: int
    target: str


class Logits(_Strict):
    """An array of float16, C order, little endian."""

    shape: list[int] = Field(min_length=1, max_length=4)
    data: str


class PredictRequest(_Strict):
    """The arguments of `SegmenterSession.predict`. A prior is a mask (run lengths) or logits."""

    image: str
    prompts: list[ClickPrompt | BoxPrompt]
    prior_mask: dict[str, Any] | None = None
    prior_logits: Logits | None = None


class PredictReply(_Strict):
    """A `Prediction`."""

    mask: dict[str, Any]
    score: float
    logits: Logits


class ErrorReply(_Strict):
    """What went wrong, in one line."""

    error: str


def encode_request(image_sha256: str, prompts: Sequence[Prompt], prior: np.ndarray | None) -> PredictRequest:
    """The request for one prediction."""
    given = [
        ClickPrompt(x=prompt.x, y=prompt.y, positive=prompt.positive, target=prompt.target)
        if isinstance(prompt, Click)
        else BoxPrompt(x0=prompt.x0, y0=prompt.y0, x1=prompt.x1, y1=prompt.y1, target=prompt.target)
        for prompt in prompts
    ]
    request = PredictRequest(image=image_sha256, prompts=given)
    if prior is not None and prior.dtype == np.bool_:
        request.prior_mask = encode_rle(prior)
    elif prior is not None:
        request.prior_logits = _encode_logits(prior)
    return request


def decode_request(request: PredictRequest) -> tuple[list[Prompt], np.ndarray | None]:
    """Prompts and prior of a request; DataError or ConfigError for values that cannot be."""
    prompts: list[Prompt] = [
        Click(given.x, given.y, given.positive, given.target)
        if isinstance(given, ClickPrompt)
        else Box(given.x0, given.y0, given.x1, given.y1, given.target)
        for given in request.prompts
    ]
    if request.prior_mask is not None:
        return prompts, decode_rle(request.prior_mask)
    return prompts, None if request.prior_logits is None else _decode_logits(request.prior_logits)


def encode_prediction(prediction: Prediction) -> PredictReply:
    """The reply that carries a prediction."""
    return PredictReply(
        mask=encode_rle(prediction.mask), score=prediction.score, logits=_encode_logits(prediction.logits)
    )


def decode_prediction(reply: PredictReply) -> Prediction:
    """The prediction in a reply; DataError if it is damaged."""
    return Prediction(decode_rle(reply.mask), reply.score, _decode_logits(reply.logits))


def _encode_logits(logits: np.ndarray) -> Logits:
    small = np.clip(logits, -MAX_LOGIT, MAX_LOGIT).astype("<f2")
    return Logits(shape=list(small.shape), data=base64.b64encode(small.tobytes()).decode("ascii"))


def _decode_logits(logits: Logits) -> np.ndarray:
    try:
        flat = np.frombuffer(base64.b64decode(logits.data, validate=True), dtype="<f2")
        return flat.reshape(logits.shape).astype(np.float32)
    except ValueError as error:
        raise DataError(f"logits do not fill their shape {logits.shape}: the message is damaged") from error
