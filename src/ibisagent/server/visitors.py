"""What stands between the visitors of the page and Gradio: its addresses that are open, and each visitor's uploads.

Gradio has many more addresses than the page needs, and several of them take a path or a URL from the client. Here only
those that are listed are passed on, rewritten so that they hold nothing but what this visitor may name. Uploads do not
go through Gradio at all, and pictures are shown without files (see `page`), so no address gives a file out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ibisagent.errors import DataError
from ibisagent.server.auth import Keys, again, set_cookie
from ibisagent.server.service import plain_name

API = "/gradio_api"
EVENT_BYTES = 2**18  # of the JSON of one event
KEPT_UPLOADS = 4  # of one visitor, until they are opened
ALL_UPLOADS = 64
_HASH = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VISITOR = re.compile(r"[0-9a-f]{32}")
_PLAIN = re.compile(  # what is the same for everybody: the page's own scripts and styles
    rf"/(assets|static)/[A-Za-z0-9._/@+-]+|/favicon\.ico|/manifest\.json|/theme\.css"
    rf"|{API}/theme\.css"
)
_META_OF_OTHERS = re.compile(rb"<meta\s[^>]*(?:og:|twitter:)[^>]*>")  # Gradio's logo, at its makers' address


class Uploads:
    """Files that visitors dropped on the page: `<folder>/<visitor>/<random>/<name>`, each for its visitor alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new(self, visitor: str, name: str) -> Path:
        """A place for one more file of a visitor; the oldest go where there are too many."""
        kept = sorted(self.folder.glob("*/*"), key=_written)
        own = [one for one in kept if one.parent.name == visitor]
        for one in {*own[: max(0, len(own) + 1 - KEPT_UPLOADS)], *kept[: max(0, len(kept) + 1 - ALL_UPLOADS)]}:
            shutil.rmtree(one, ignore_errors=True)
        place = self.folder / visitor / uuid.uuid4().hex
        for folder in (place.parent, place):
            folder.mkdir(mode=0o700, exist_ok=True)
        return place / _file_name(name)

    def handle(self, file: Path) -> str:
        """What a client is told of a file: enough to name it, nothing of this machine."""
        return f"{file.parent.name}/{file.name}"

    def owned(self, visitor: str | None, path: object) -> Path:
        """The file that a handle or path names, if this visitor uploaded it. DataError for any other."""
        if isinstance(path, str) and visitor is not None and _VISITOR.fullmatch(visitor):
            own = Path(os.path.realpath(self.folder)) / visitor
            try:
                file = Path(os.path.realpath(own / path, strict=True))  # also where a link leads
                if file.is_relative_to(own) and file.is_file():
                    return file
            except (OSError, ValueError):  # not there; a zero byte
                pass
        raise DataError("this file was not uploaded by you, or is gone: drop it again")

    def take(self, visitor: str | None, path: str) -> tuple[str, bytes]:
        """Name and content of a visitor's file, which is gone then. DataError as `owned`."""
        file = self.owned(visitor, path)
        content = file.read_bytes()
        shutil.rmtree(file.parent, ignore_errors=True)
        return file.name, content


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone meanwhile
        return 0.0


def _file_name(name: str) -> str:
    """The last part of a client's name, fit for a disk; its ending tells the format."""
    plain = plain_name(name).replace("/", "_").lstrip(".") or "image"
    return plain.encode()[-200:].decode(errors="ignore")


class PageDoor:
    """Passes on to Gradio what the page needs; everything else is not there."""

    def __init__(self, app: ASGIApp, uploads: Uploads, keys: Keys, *, max_upload: int, events: Collection[int]) -> None:
        """keys: make the cookies of visitors without a token. max_upload: bytes of one file. events: the page's own."""
        self.app, self._events = app, events
        self._uploads, self._keys, self._max_upload = uploads, keys, max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except (HTTPException, DataError) as error:
            status, reason = (
                (error.status_code, error.detail) if isinstance(error, HTTPException) else (422, str(error))
            )
            await JSONResponse({"detail": reason}, status_code=status)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        asked = f"{scope['method']} {path}"
        visitor: str | None = scope.get("visitor")
        if asked == "GET /":
            await self._front(_passed(scope), receive, send)
            return
        if scope["method"] == "GET" and (path == "/config" or (_PLAIN.fullmatch(path) and ".." not in path)):
            await self.app(_passed(scope), receive, send)
            return
        heartbeat = re.fullmatch(rf"{API}/heartbeat/(.+)", path)
        posts = {f"POST {API}/upload", f"POST {API}/queue/join", f"POST {API}/cancel"}
        if asked == f"GET {API}/upload_progress":  # what Gradio's upload component asks beside an upload
            await Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")(scope, receive, send)
            return
        if asked not in {*posts, f"GET {API}/queue/data"} and not (heartbeat and scope["method"] == "GET"):
            await JSONResponse("closed", status_code=404)(scope, receive, send)
            return
        if visitor is None:
            raise HTTPException(403, "open the page first: this browser has no cookie of this server")
        if heartbeat:
            scope = _passed(scope, path=f"{API}/heartbeat/{_session(visitor, heartbeat[1])}")
            await self.app(scope, receive, send)
        elif asked == f"GET {API}/queue/data":
            hashes = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])
            query = urlencode({"session_hash": _session(visitor, hashes[0] if len(hashes) == 1 else None)})
            await self.app(_passed(scope, query=query), receive, send)
        elif asked == f"POST {API}/upload":
            handles = await self._take(visitor, Request(scope, receive))
            await JSONResponse(handles)(scope, receive, send)
        else:
            event = await self._event(visitor, Request(scope, receive), joins=path.endswith("join"))
            await self.app(*_with_body(scope, receive, json.dumps(event).encode()), send)

    async def _front(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page itself, with a cookie for whoever has none, and without what is Gradio's own at other addresses."""
        headers = Headers(scope=scope)
        if scope.get("visitor") is None and headers.get("sec-fetch-site") == "cross-site":
            await again()(scope, receive, send)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        start: Message = {}
        body = bytearray()

        async def gather(message: Message) -> None:
            start.update(message if message["type"] == "http.response.start" else {})
            body.extend(message.get("body", b""))

        await self.app(scope, receive, gather)
        answer = Response(_META_OF_OTHERS.sub(b"", bytes(body)), start["status"], media_type="text/html")
        answer.headers["cache-control"] = "no-store"
        if scope.get("visitor") is None:
            set_cookie(answer, scope, self._keys.new_cookie())
        await answer(scope, receive, send)

    async def _take(self, visitor: str, request: Request) -> list[str]:
        """Keep one uploaded file; the list of its handle, as Gradio's upload component wants it."""
        async with request.form(max_files=1, max_fields=0) as form:
            files = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
            if len(files) != 1:
                raise HTTPException(422, "an upload is one file, as 'files'")
            [upload] = files
            if (upload.size or 0) > self._max_upload:
                reason = (
                    f"{plain_name(upload.filename or '')}: {upload.size} bytes, at most {self._max_upload} are taken"
                )
                raise HTTPException(413, reason)
            file = await run_in_threadpool(self._uploads.new, visitor, upload.filename or "image")
            await run_in_threadpool(_write, upload, file)
        return [self._uploads.handle(file)]

    async def _event(self, visitor: str, request: Request, *, joins: bool) -> dict[str, Any]:
        """What of an event's JSON is passed on: known fields, this visitor's session, and this visitor's files."""
        content = bytearray()
        try:
            async for chunk in request.stream():
                content += chunk
                if len(content) > EVENT_BYTES:
                    raise HTTPException(413, f"the event is larger than {EVENT_BYTES} bytes")
            sent = json.loads(content)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise HTTPException(422, "the event cannot be read as JSON") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the event did not arrive") from error
        if not isinstance(sent, dict):
            raise HTTPException(422, "an event is a JSON object")
        if type(sent.get("fn_index")) is not int or sent["fn_index"] not in self._events:
            raise HTTPException(422, "the page has no such event: load it again")
        names = ("data", "fn_index", "event_data", "trigger_id") if joins else ("fn_index", "event_id")
        event = {name: sent[name] for name in names if name in sent}
        event["session_hash"] = _session(visitor, sent.get("session_hash"))
        for file in _files(event):
            owned = self._uploads.owned(visitor, file.get("path"))
            file.clear()
            file |= {"path": str(owned), "orig_name": owned.name, "meta": {"_type": "gradio.FileData"}}
        return event


def _files(value: Any) -> Iterator[dict[str, Any]]:
    """Whatever Gradio, in this version or another, might take for a file."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            todo += one
        elif isinstance(one, dict):
            if one.keys() & {"path", "url", "meta", "is_file", "orig_name"}:
                yield one
            else:
                todo += one.values()


def _session(visitor: str, session_hash: object) -> str:
    """The name that Gradio knows a tab by: the visitor's, so that nobody speaks for the tab of another."""
    if not isinstance(session_hash, str) or not _HASH.fullmatch(session_hash):
        raise HTTPException(422, "session_hash must be 1 to 64 letters and digits")
    return f"{visitor}.{session_hash}"


def visitor_in(session_hash: str | None) -> str | None:
    """The visitor of a Gradio session that came through the door."""
    return (session_hash or "").partition(".")[0] or None


def _passed(scope: Scope, *, path: str | None = None, query: str = "") -> Scope:
    """A request for Gradio: what it asks for, and of its query what we made."""
    passed = {**scope, "query_string": query.encode()}
    if path is not None:
        passed |= {"path": scope.get("root_path", "") + path, "raw_path": path.encode()}
    return passed


def _with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    passed = _passed(scope)
    passed["headers"] = list(scope["headers"])
    headers = MutableHeaders(scope=passed)
    headers["content-length"], headers["content-type"] = str(len(body)), "application/json"
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return passed, replay


def _write(upload: UploadFile, file: Path) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
        shutil.copyfileobj(upload.file, target)
