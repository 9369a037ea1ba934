"""`remote`: a segmenter elsewhere, over HTTP (see `remote_schema`; the server is `server.segmenter_server`)."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from http import HTTPStatus

import httpx
import numpy as np
from pydantic import BaseModel, ValidationError

from ibisagent.domain import Image, Prompt
from ibisagent.errors import ConfigError, DataError, SegmenterError
from ibisagent.files import png_bytes
from ibisagent.segmenters import Prediction, check_prior, check_prompts
from ibisagent.segmenters.remote_schema import ErrorReply, PredictReply, decode_prediction, encode_request

TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 5.0
RETRY_AFTER_S = (0.2, 0.6, 1.8)  # waits between the attempts to connect


class RemoteSegmenter:
    """The segmenter. It asks the server what it is at once, so that a wrong address shows before any work is done.

    url: "http://host:port". The token, if the server wants one, is read from the environment: IBIS_TOKEN.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"remote:{url}: give an address such as remote:http://127.0.0.1:8001")
        self.url = url.rstrip("/")
        self.name = f"remote:{self.url}"
        token = os.environ.get("IBIS_TOKEN", "")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
        )
        self.close = weakref.finalize(self, self._client.close)  # on request, else when nobody needs it any more
        answer = self._ask("GET", "/v1/segmenter").json()
        if not isinstance(answer, dict) or "segmenter" not in answer:
            raise SegmenterError(f"{self.url} answers, but is no segmenter server: check the address")
        self._facts = {str(key): str(value) for key, value in answer.items()}

    def open(self, image: Image) -> RemoteSession:
        """A session on `image`; its pixels are sent unless the server has them."""
        session = RemoteSession(self, image)
        session.ensure_open()
        return session

    def describe(self) -> dict[str, str]:
        """Facts for records: those of the server's segmenter, and "serves", its name there."""
        return {**self._facts, "segmenter": self.name, "serves": self._facts["segmenter"]}

    def _ask(
        self, method: str, path: str, *, accept: Sequence[int] = (), json: BaseModel | None = None, body: bytes = b""
    ) -> httpx.Response:
        """One request and its answer. Statuses of `accept` are returned, other refusals are raised."""
        content = json.model_dump_json().encode() if json is not None else body
        response = self._send(method, path, content, "application/json" if json is not None else "image/png")
        if response.is_success or response.status_code in accept:
            return response
        message = f"{self.url}: {_error_text(response)}"
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            raise ConfigError(f"{message}: set IBIS_TOKEN to the server's token")
        if response.status_code == HTTPStatus.BAD_REQUEST:
            raise ConfigError(message)
        raise SegmenterError(message)

    def _send(self, method: str, path: str, content: bytes, kind: str) -> httpx.Response:
        """One request, sent again while no connection comes about; the same request twice does no harm."""
        waits_s = list(RETRY_AFTER_S)
        while True:
            try:
                return self._client.request(method, path, content=content, headers={"Content-Type": kind})
            except httpx.TimeoutException as error:
                reason = type(error).__name__
                raise SegmenterError(f"{self.url}: no answer in time ({reason}): is it overloaded?") from error
            except httpx.TransportError as error:
                if not waits_s:
                    reason = str(error) or type(error).__name__
                    raise SegmenterError(f"{self.url}: no connection ({reason}): start the server there") from error
                time.sleep(waits_s.pop(0))


class RemoteSession:
    """One image that the server has open. Its logits are those of the server's segmenter, in float16 precision."""

    def __init__(self, segmenter: RemoteSegmenter, image: Image) -> None:
        self._segmenter = segmenter
        self._image = image

    def ensure_open(self) -> None:
        """Send the pixels unless the server has them."""
        path = f"/v1/images/{self._image.sha256}"
        if self._segmenter._ask("GET", path, accept=[HTTPStatus.NOT_FOUND]).status_code == HTTPStatus.NOT_FOUND:
            self._segmenter._ask("PUT", path, body=png_bytes(self._image.pixels))

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """See `SegmenterSession`."""
        size = self._image.size
        check_prompts(prompts, size)
        check_prior(prior, size, () if prior is None else prior.shape)  # the server knows the shape of its logits
        request = encode_request(self._image.sha256, prompts, prior)
        ask = self._segmenter._ask
        response = ask("POST", "/v1/predict", json=request, accept=[HTTPStatus.NOT_FOUND])
        if response.status_code == HTTPStatus.NOT_FOUND:  # the server was restarted, or had to make room
            self.ensure_open()
            response = ask("POST", "/v1/predict", json=request)
        try:
            prediction = decode_prediction(PredictReply.model_validate_json(response.content))
        except (ValidationError, DataError) as error:
            raise SegmenterError(f"{self._segmenter.url}: cannot read its answer: update client and server") from error
        if prediction.mask.shape != size:
            raise SegmenterError(f"{self._segmenter.url}: answers {prediction.mask.shape} for an image of {size}")
        return prediction


def _error_text(response: httpx.Response) -> str:
    try:
        return ErrorReply.model_validate_json(response.content).error
    except ValidationError:
        return f"status {response.status_code}"
