"""Who may ask a server of ours: whoever has the token, or, where there is none, this machine alone."""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as PlainRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ibisagent.errors import ConfigError

LOOPBACK_NAMES = ("127.0.0.1", "localhost")


def token_for(host: str) -> str | None:
    """The token from IBIS_TOKEN, None if unset. ConfigError without one, unless `host` is this machine's loopback."""
    token = os.environ.get("IBIS_TOKEN") or None
    if token is None and not _is_loopback(host):
        raise ConfigError(f"host {host} can be reached from elsewhere: set IBIS_TOKEN to a secret, or use 127.0.0.1")
    return token


OPEN_PATHS = ("/health", "/ready", "/login")
COOKIE = "ibisagent_token"


class Gate:
    """Stands before a whole application, whatever is mounted in it, and lets in what may come in.

    - With a token only requests that carry it, as "Authorization: Bearer <token>" or, in a browser, as the cookie that
      the page /login sets. `OPEN_PATHS` need none.
    - No request that another web page makes a browser send (its Origin is not this server).
    - Bodies state their length, and it is at most `max_body` bytes: nothing unbounded is ever read.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        max_body: int,
        observe: Callable[[str, str, int, float], None] = lambda *_: None,
    ) -> None:
        """observe: called with method, path, status and seconds of every answered request."""
        self._app, self._token, self._max_body, self._observe = app, token, max_body, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_SAFE_HEADERS]
            await send(message)

        refusal = self._refusal(PlainRequest(scope))
        try:
            await (refusal or self._app)(scope, receive, sending)
        finally:
            self._observe(scope["method"], scope["path"], status, time.perf_counter() - started)

    def _refusal(self, request: PlainRequest) -> Response | None:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return _refuse(403, "requests from other web pages are not answered")
        if self._token and request.url.path not in OPEN_PATHS and not self._knows(request):
            if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
                return RedirectResponse("/login", 303)
            return _refuse(401, "wrong or missing token: send it as 'Authorization: Bearer <token>'")
        length = request.headers.get("content-length")
        if length is None:
            if "transfer-encoding" in request.headers:
                return _refuse(411, "the request does not say how long it is: send Content-Length")
        elif not length.isdecimal() or int(length[:20]) > self._max_body:
            return _refuse(413, f"the request is larger than {self._max_body} bytes")
        return None

    def _knows(self, request: PlainRequest) -> bool:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(COOKIE, "")
        return is_token(sent, self._token)


_SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"no-referrer"),
]


def is_token(sent: str, token: str | None) -> bool:
    """Whether a client sent the token; takes the same time wherever it differs."""
    return bool(token) and hmac.compare_digest(sent.encode(), str(token).encode())


def _refuse(status: int, reason: str) -> Response:
    return JSONResponse({"detail": reason}, status_code=status)


def guard(app: FastAPI, token: str | None) -> Callable[[Request], None]:
    """A dependency that refuses requests without the token.

    Without a token only requests addressed to this machine's loopback names are answered, so that no web page can reach
    the server through a name of its own.
    """
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["*"] if token else list(LOOPBACK_NAMES))

    def authorise(request: Request) -> None:
        sent = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "wrong or missing token")

    return authorise


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request; status 413 as soon as it is longer than `max_bytes`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HTTPException(413, f"the request is larger than {max_bytes} bytes")
    return bytes(body)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
