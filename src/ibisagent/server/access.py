"""Who may ask a server of ours: whoever has the token, or, where there is none, this machine alone."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from ipaddress import ip_address

from fastapi import FastAPI, HTTPException, Request
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ibisagent.errors import ConfigError

LOOPBACK_NAMES = ("127.0.0.1", "localhost")


def token_for(host: str) -> str | None:
    """The token from IBIS_TOKEN, None if unset. ConfigError without one, unless `host` is this machine's loopback."""
    token = os.environ.get("IBIS_TOKEN") or None
    if token is None and not _is_loopback(host):
        raise ConfigError(f"host {host} can be reached from elsewhere: set IBIS_TOKEN to a secret, or use 127.0.0.1")
    return token


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
