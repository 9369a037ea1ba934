"""Talks to `ibisagent serve` from Python; needs neither torch nor any model.

    from ibisagent.server.client import Client

    with Client("http://127.0.0.1:8002") as client:
        masks = client.segment("eye.png", "Segment the optic disc.")
        session = client.open("eye.png", "Segment the optic disc.")
        for turn in session.stream():
            print(turn["thought"], turn["actions"])
        session.click(120, 80, positive=False)
        session.masks()["optic disc"]          # (H, W) bool

What the server refuses is DataError or ConfigError with its own words; what fails there is PolicyError.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np
import PIL.Image

from ibisagent.domain import Mask
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.imaging.masks import decode_rle

JobView = dict[str, Any]
SessionView = dict[str, Any]
TurnView = dict[str, Any]


class Client:
    """One server. Close it, or use it as a context manager."""

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 600.0) -> None:
        """url: such as http://127.0.0.1:8002. token: default IBIS_TOKEN. timeout: seconds to wait for an answer."""
        token = os.environ.get("IBIS_TOKEN") if token is None else token
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> dict[str, Any]:
        """The server's models with licences and hashes, its limits and version."""
        return dict(self.call("GET", "/v1/models").json())

    def segment(self, image: str | Path | bytes, query: str, *, max_turns: int | None = None) -> dict[str, Mask]:
        """The masks, (H, W) bool by target, of one run on one image; empty for objects that are called absent."""
        fields = {"query": query, **({} if max_turns is None else {"max_turns": str(max_turns)})}
        answer = self.call("POST", "/v1/segment", data=fields, files=[("image", _upload(image))]).json()
        return {name: decode_rle(rle) for name, rle in answer["masks"].items()}

    def open(
        self, image: str | Path | bytes, query: str, *, start_mask: str | Path | bytes | None = None
    ) -> RemoteSession:
        """A new session on an image. image: a file, or its content."""
        files = [("image", _upload(image))]
        if start_mask is not None:
            files.append(("start_mask", _upload(start_mask)))
        return RemoteSession(self, self.call("POST", "/v1/sessions", data={"query": query}, files=files).json())

    def session(self, id: str) -> RemoteSession:  # noqa: A002
        """A session that was opened earlier."""
        return RemoteSession(self, self.call("GET", f"/v1/sessions/{id}").json())

    def submit(self, images: Sequence[str | Path], query: str) -> JobView:
        """Segment many images in the background; see `job`, `wait`, `results`."""
        files = [("images", _upload(image)) for image in images]
        return dict(self.call("POST", "/v1/jobs", data={"query": query}, files=files).json())

    def job(self, id: str) -> JobView:  # noqa: A002
        """How far a job is."""
        return dict(self.call("GET", f"/v1/jobs/{id}").json())

    def wait(self, id: str, *, every: float = 0.5) -> JobView:  # noqa: A002
        """The job when it is over; looks `every` so many seconds."""
        while (job := self.job(id))["state"] in ("waiting", "running"):
            time.sleep(every)
        return job

    def cancel(self, id: str) -> JobView:  # noqa: A002
        """End a job after the images under way."""
        return dict(self.call("POST", f"/v1/jobs/{id}/cancel").json())

    def results(self, id: str) -> bytes:  # noqa: A002
        """A zip of what a job has made."""
        return self.call("GET", f"/v1/jobs/{id}/results").content

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request; the errors of this module for whatever is not answered with success."""
        try:
            answer = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise PolicyError(f"{self.url}: cannot be reached ({error}); start it with 'ibisagent serve'") from error
        _check(answer)
        return answer

    def events(self, path: str, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Server-sent events of one request, as (kind, value)."""
        try:
            with self._http.stream("POST", path, json=body) as answer:
                if answer.is_error:
                    answer.read()
                _check(answer)
                kind = ""
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        kind = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        yield kind, json.loads(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            raise PolicyError(
                f"{self.url}: broke off ({error}); the session is as it was after its last turn"
            ) from error


class RemoteSession:
    """A session on a server; `view` is how it stood after the last call."""

    def __init__(self, client: Client, view: SessionView) -> None:
        self._client, self.view = client, view
        self.id: str = view["id"]

    def refresh(self) -> SessionView:
        """Look again."""
        self.view = self._client.call("GET", f"/v1/sessions/{self.id}").json()
        return self.view

    def ask(self, query: str | None = None) -> SessionView:
        """One turn of the agent."""
        return self._stepped("ask", {"query": query})

    def run(self, query: str | None = None, **options: int) -> SessionView:
        """Turns of the agent until it ends. options: max_turns."""
        return self._stepped("run", {"query": query, **options})

    def stream(self, query: str | None = None, **options: int) -> Iterator[TurnView]:
        """As `run`, but gives every turn as it is taken. Leaving the loop takes over."""
        for kind, value in self._client.events(f"/v1/sessions/{self.id}/run/stream", {"query": query, **options}):
            if kind == "turn":
                yield value
            elif kind == "end":
                self.view = value["session"]
            else:
                raise PolicyError(value["detail"])

    def click(self, x: int, y: int, *, positive: bool = True, target: str | None = None) -> SessionView:
        """A user's click."""
        return self._act("click", {"x": x, "y": y, "positive": positive, "target": target})

    def box(self, x0: int, y0: int, x1: int, y1: int, *, target: str | None = None) -> SessionView:
        """A user's box, half-open."""
        return self._act("box", {"x0": x0, "y0": y0, "x1": x1, "y1": y1, "target": target})

    def accept(self, answer: str = "", absent: Sequence[str] = ()) -> SessionView:
        """The masks are right; `absent` names objects that the image does not show."""
        return self._act("accept", {"answer": answer, "absent": list(absent)})

    def interrupt(self) -> SessionView:
        """End the agent's run."""
        return self._act("interrupt", {})

    def undo(self) -> SessionView:
        """Take back the newest turn with clicks or boxes."""
        return self._act("undo", {})

    def redo(self) -> SessionView:
        """Bring back what was undone."""
        return self._act("redo", {})

    def reset(self) -> SessionView:
        """Back to the beginning."""
        return self._act("reset", {})

    def fork(self, turn: int) -> RemoteSession:
        """A new session from the first `turn` turns."""
        answer = self._client.call("POST", f"/v1/sessions/{self.id}/fork", json={"turn": turn})
        return RemoteSession(self._client, answer.json())

    def masks(self) -> dict[str, Mask]:
        """The masks as they stand, (H, W) bool by target."""
        masks: dict[str, Mask] = {}
        for target in self.refresh()["targets"]:
            name = target["name"]
            answer = self._client.call("GET", f"/v1/sessions/{self.id}/mask", params={"target": name})
            masks[name] = np.array(PIL.Image.open(io.BytesIO(answer.content))) > 0
        return masks

    def export(self) -> bytes:
        """A zip of masks, overlay, records and report."""
        return self._client.call("GET", f"/v1/sessions/{self.id}/export").content

    def export_training(self) -> bytes:
        """A zip of what a user corrected, to train with (`Session.export_training`)."""
        return self._client.call("GET", f"/v1/sessions/{self.id}/training").content

    def close(self) -> None:
        """Close the session; its files go."""
        self._client.call("DELETE", f"/v1/sessions/{self.id}")

    def _act(self, name: str, body: dict[str, Any]) -> SessionView:
        self.view = self._client.call("POST", f"/v1/sessions/{self.id}/{name}", json=body).json()
        return self.view

    def _stepped(self, name: str, body: dict[str, Any]) -> SessionView:
        self.view = self._client.call("POST", f"/v1/sessions/{self.id}/{name}", json=body).json()["session"]
        return self.view


def _upload(image: str | Path | bytes) -> tuple[str, bytes]:
    if isinstance(image, bytes):
        return "image", image
    path = Path(image)
    try:
        return path.name, path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        detail = str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = answer.text[:200]
    if answer.status_code >= 500:
        raise PolicyError(f"{answer.url}: failed ({answer.status_code}): {detail}")
    if answer.status_code in (413, 422):
        raise DataError(detail)
    raise ConfigError(f"{detail} ({answer.status_code})")
