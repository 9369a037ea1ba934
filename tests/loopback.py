"""Any application on a real server of its own, on a free loopback port; what tests of servers send and ask."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import uvicorn

from ibisagent.domain import Completion, Observation
from ibisagent.policies.scripted import ScriptedPolicy


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """The address of `app` while it is served. options: of uvicorn."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def png(noise: int = 0) -> bytes:
    """A bright box; noise: side of a square of it, which makes the file as large as one wants."""
    pixels = np.full((max(61, noise), max(83, noise), 3), 30, dtype=np.uint8)
    pixels[:noise, :noise] = np.random.default_rng(0).integers(0, 255, (noise, noise, 3))
    pixels[10:30, 12:40] = 200
    encoded = io.BytesIO()
    PIL.Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


class Slow(ScriptedPolicy):
    """Takes its time."""

    def __init__(self, replies: Sequence[str], seconds: float = 0.1) -> None:
        super().__init__(replies)
        self._seconds = seconds

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        time.sleep(self._seconds)
        return super().respond(observations)
