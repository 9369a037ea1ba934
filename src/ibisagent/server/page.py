"""The web page for annotators: plain files of the package, which speak to the public API; no state of its own.

The files are read once at the start and known by name, so no address leads to any other file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.resources import files

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from ibisagent.domain import Image
from ibisagent.errors import IbisError
from ibisagent.server.app import AgentThreads
from ibisagent.server.auth import again, set_cookie, visitor_of
from ibisagent.server.service import Service

log = logging.getLogger(__name__)

_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_WARM_SIDE = 64  # pixels


def mount_page(
    app: FastAPI, service: Service, _threads: AgentThreads
) -> Callable[[], AbstractAsyncContextManager[None]]:
    """Serve the page at "/", and at "/s/ID" for a session or scan; what it returns warms the models up meanwhile."""
    folder = files("ibisagent.server") / "static"
    page = (folder / "index.html").read_text(encoding="utf-8")
    parts = {part.name: part.read_bytes() for part in folder.iterdir() if part.name != "index.html"}

    @app.get("/", include_in_schema=False)
    @app.get("/s/{id}", include_in_schema=False)
    async def front(request: Request) -> Response:
        """The page, with a cookie for a browser that has none."""
        stranger = visitor_of(request) is None
        if stranger and request.headers.get("sec-fetch-site") == "cross-site":
            return again()  # a link elsewhere: the cookie does not come along
        answer = HTMLResponse(page, headers={"cache-control": "no-store"})
        if stranger:
            set_cookie(answer, request.scope, app.state.keys.new_cookie())
        return answer

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        """A part of the page."""
        if name not in parts:
            raise HTTPException(404, "no such part of the page")
        kind = _KINDS["." + name.rpartition(".")[2]]
        return Response(parts[name], media_type=kind, headers={"cache-control": "no-cache"})

    @app.get("/static/sample/eye.jpg", include_in_schema=False)
    def sample() -> Response:
        """A photograph of an eye to try the page with, from scikit-image."""
        content = (files("skimage") / "data" / "retina.jpg").read_bytes()
        return Response(content, media_type="image/jpeg")

    @asynccontextmanager
    async def warmed() -> AsyncIterator[None]:
        threading.Thread(target=_preload, args=(service,), name="warm-up", daemon=True).start()
        yield

    return warmed


def _preload(service: Service) -> None:
    """One turn on an empty image, so that the first one of a user finds the models ready."""
    blank = Image(np.zeros((_WARM_SIDE, _WARM_SIDE, 3), np.uint8))
    try:
        session = service.open_unkept(blank, "Segment the object.")
        session.preview(_WARM_SIDE // 2, _WARM_SIDE // 2)
        session.run(max_turns=1)
    except IbisError as error:  # whoever asks first is told
        log.warning("the models could not be warmed up: %s", error)
