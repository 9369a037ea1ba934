"""How our servers listen: uvicorn, with connections that are bounded in number and in time."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ibisagent.server.auth import bare_host

MOST_CONNECTIONS = 1000
IDLE_SECONDS = 8.0  # for a whole header, from its first byte or the beginning of the connection
KEPT_SECONDS = 75  # from an answer to the next request: longer than clients and proxies keep a connection
STALL_SECONDS = 30.0  # in which a client has to take some of its answer
GRACEFUL_SECONDS = 5
OPEN_FILES = 4096
STARTUP_FAILURE = 3  # the exit status, as uvicorn has it


class PatientProtocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with a patience that ends.

    Where no answer is owed (the header is not there yet, or the rest of a refused body is still coming) a connection
    ends after IDLE_SECONDS, and earlier where there are too many: the oldest of these makes room. So clients that send
    slowly, or nothing, never keep others out. One that does not take its answer ends as well.

    One that has its answer and sends nothing is kept for KEPT_SECONDS: whoever sends on a connection while it is being
    closed gets an error, and does not know whether the request was read.
    """

    _idle_since = 0.0
    _idle: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no answer is owed."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As asyncio has it."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > MOST_CONNECTIONS:
            others = [one for one in self.connections if isinstance(one, PatientProtocol) and one.idle]
            min(others, key=lambda one: one._idle_since).transport.abort()

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """As uvicorn has it; it may begin to answer the next request."""
        self._unwatch()
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._idle_since = self.loop.time()  # uvicorn ends it, see `options`
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""
        self._unwatch()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """As asyncio has it."""
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self._stalled, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """As asyncio has it."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    def _watch(self) -> None:
        if not self.idle or self.transport.is_closing():
            self._unwatch()
        elif self._idle is None:
            self._idle_since = self.loop.time()
            self._idle = self.loop.call_later(IDLE_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _stalled(self, waited: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= waited:
            self.transport.abort()
        else:
            self._stall = self.loop.call_later(STALL_SECONDS, self._stalled, left)


def options() -> dict[str, Any]:
    """What our servers ask of uvicorn."""
    return {
        "http": PatientProtocol,
        "ws": "none",  # nothing here speaks over web sockets
        "server_header": False,
        # Only where somebody said who may send them: whoever tries tokens from this machine would name a new client
        # each time.
        "proxy_headers": "FORWARDED_ALLOW_IPS" in os.environ,
        "timeout_graceful_shutdown": GRACEFUL_SECONDS,
        "timeout_keep_alive": KEPT_SECONDS,
    }


class _Server(uvicorn.Server):
    """Tells the application at once that it is to stop, so that answers under way end before they are cut off."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn has it."""
        await asyncio.get_running_loop().run_in_executor(None, self._on_stop)
        await super().shutdown(sockets)


def listen(app: ASGIApp, host: str, port: int, *, on_stop: Callable[[], None] = lambda: None) -> None:
    """Serve `app` until interrupted. host: an address or name, IPv6 also in brackets.

    on_stop: called when that happens, before the answers under way are waited for.
    """
    _raise_file_limit()
    config = uvicorn.Config(cast(Any, app), host=bare_host(host), port=port, log_level="warning", **options())
    server = _Server(config, on_stop)
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has stopped
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def _raise_file_limit() -> None:
    """Room for MOST_CONNECTIONS beside the files of the work itself; many systems begin with 1024 for both."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < OPEN_FILES:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, OPEN_FILES), hard))
