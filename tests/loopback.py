"""Any application on a real server of its own, on a free loopback port; what tests of servers send and ask."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import phantoms
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


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(url: str, running: subprocess.Popen[bytes]) -> None:
    """Wait for the process that is to serve `url` to be ready, on a busy machine as well."""
    deadline = time.monotonic() + 180
    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready").is_success:
                return
        assert running.poll() is None, "the server did not start"
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.05)


def png(noise: int = 0, **box: Any) -> bytes:
    """A bright box (box: see there) in a file that `noise` makes as large as one wants."""
    return phantoms.png(phantoms.bright_box(**{"size": (max(61, noise), max(83, noise)), "noise": noise, **box}))


class Slow(ScriptedPolicy):
    """Takes its time."""

    def __init__(self, replies: Sequence[str], seconds: float = 0.1) -> None:
        super().__init__(replies)
        self._seconds = seconds

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        time.sleep(self._seconds)
        return super().respond(observations)
