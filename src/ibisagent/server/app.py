"""The HTTP server: sessions, one-shot segmentation, batch jobs, health, metrics; the API is described at /docs.

`create_app(service)` gives the application; `page`, `monai` and `mcp` are mounted in it by `serve`.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from ibisagent.domain import MAX_NAME_CHARS, MAX_QUERY_CHARS, Mask
from ibisagent.environment import package_version
from ibisagent.errors import IbisError, PolicyError, SegmenterError, TooLargeError
from ibisagent.files import file_names, png_bytes
from ibisagent.imaging.masks import encode_rle
from ibisagent.inference.image import asked_objects
from ibisagent.inference.rounds import Step
from ibisagent.inference.session import BusyError, RunEnd, Session
from ibisagent.protocol import overlay
from ibisagent.server.auth import (
    AnswersOtherPages,
    AuthMiddleware,
    Keys,
    OtherPages,
    checked_origin,
    token_for,
    visitor_of,
)
from ibisagent.server.docs import docs_page
from ibisagent.server.job_routes import Tags, add_jobs, file_answer
from ibisagent.server.listening import listen
from ibisagent.server.metrics import MONAI_PATHS, Metrics
from ibisagent.server.schemas import (
    AcceptRequest,
    AskRequest,
    BoxRequest,
    ClickRequest,
    ErrorView,
    ForkRequest,
    ResetRequest,
    RunRequest,
    SegmentView,
    SessionView,
    StepView,
    TurnView,
    session_view,
    turn_view,
)
from ibisagent.server.service import FullError, MissingError, Service
from ibisagent.server.storage import no_room
from ibisagent.server.zips import export_zip, training_zip
from ibisagent.store import record_json

Returned = TypeVar("Returned")
_log = logging.getLogger("ibisagent.server")

KEPT = {"cache-control": "private, max-age=3600, immutable"}  # what never changes at its address
FORM_BYTES = 2**20  # what a request may hold beside its upload
EXPIRY_SECONDS = 10.0  # between two looks at what is idle: sessions, jobs, memory
M_ARENA_MAX, HEAPS = -8, 2  # as malloc.h has it
ALIVE_SECONDS = 15.0  # in which a stream says something, so that no proxy takes it for dead


_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorView, "description": what}
    for code, what in {
        400: "cannot be read",
        401: "wrong or missing token",
        404: "not there",
        409: "the agent, or somebody else, is at work",
        413: "too large",
        422: "cannot be used as it is",
        429: "the server is full",
        503: "a model failed, or the server stops",
        507: "the server's disk is full",
    }.items()
}


class AgentThreads:
    """Threads of their own for what waits for the model, so that clicks and looks never wait behind runs."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="agent")

    async def __call__(self, work: Callable[[], Returned]) -> Returned:
        """The result of `work`, done in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


Mount: TypeAlias = Callable[[FastAPI, Service, AgentThreads], Callable[[], Any] | None]
"""Adds something to an application; what it returns, if anything, is an async context manager that runs with it."""


def create_app(
    service: Service,
    *,
    token: str | None = None,
    mounts: tuple[Mount, ...] = (),
    origins: Iterable[str] = (),
) -> FastAPI:
    """The application around `service`, which it closes when it ends.

    token: what clients must send, see `auth.AuthMiddleware`; without one only loopback names are answered. mounts: add
    more to the application (page, MONAI Label, MCP). origins: of web pages from elsewhere that may use the addresses of
    MONAI Label, as OHIF does; without a token pages of this machine may as well. ConfigError for what is no origin.
    """
    threads = AgentThreads(2 * service.limits.sessions)
    metrics = Metrics(service)
    running: list[Callable[[], Any]] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for start in running:
                await stack.enter_async_context(start())
            expiry = asyncio.create_task(_expire(service))
            try:
                yield
            finally:
                expiry.cancel()
                await run_in_threadpool(service.close)

    app = FastAPI(
        title="ibisagent",
        version=package_version(),
        summary="Name an object in a biomedical image, get its mask. Research software: not for clinical use.",
        lifespan=lifespan,
        responses=_ERRORS,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service, app.state.metrics, app.state.keys = service, metrics, Keys(token)
    _handle_errors(app)
    _add_open(app, service, metrics)
    _add_sessions(app, service, threads, metrics)
    _add_segment(app, service, threads)
    add_jobs(app, service)
    for mount in mounts:
        started = mount(app, service, threads)
        if started is not None:
            running.append(started)
    others = OtherPages(frozenset(map(checked_origin, origins)), MONAI_PATHS, loopback=token is None)
    app.add_middleware(AnswersOtherPages, others=others)
    limit = service.limits.upload_bytes + FORM_BYTES
    app.add_middleware(
        AuthMiddleware, keys=app.state.keys, max_body=limit, browsers=True, others=others, observe=metrics.observe
    )
    return app


def check_host(host: str) -> None:
    """ConfigError for a host that can be reached from elsewhere without a token."""
    token_for(host)


def standard_mounts(
    *,
    page: bool,
    labels: Sequence[str] = ("target",),
    studies: str | None = None,
    learn_every: int | None = None,
) -> tuple[Mount, ...]:
    """What `ibisagent serve` adds to the application.

    labels, studies: see `monai.mount_monai`. learn_every: see `teaching.Teacher`.
    """
    from ibisagent.server.annotate import mount_annotate
    from ibisagent.server.mcp import mount_mcp
    from ibisagent.server.monai import mount_monai
    from ibisagent.server.teaching_routes import mount_teaching

    mounts: list[Mount] = [mount_annotate, partial(mount_monai, labels=tuple(labels), studies=studies), mount_mcp]
    mounts.append(partial(mount_teaching, learn_every=learn_every))
    if page:
        from ibisagent.server.page import mount_page

        mounts.append(mount_page)
    return tuple(mounts)


def serve(
    service: Service,
    *,
    host: str = "127.0.0.1",
    port: int = 8002,
    mounts: tuple[Mount, ...] = (),
    origins: Iterable[str] = (),
) -> None:
    """Serve until interrupted; the token comes from IBIS_TOKEN. ConfigError without one, unless `host` is loopback.

    Temporary files of every library in this process go to the data folder as well, and whatever the process writes is
    for its user alone.
    """
    os.umask(0o077)
    _keep_few_heaps()
    tempfile.tempdir = str(service.folder / "uploads")
    app = create_app(service, token=token_for(host), mounts=mounts, origins=origins)
    listen(app, host, port, on_stop=service.stop)


async def _expire(service: Service) -> None:
    while True:
        await asyncio.sleep(EXPIRY_SECONDS)
        try:
            await run_in_threadpool(service.expire)
        except (IbisError, OSError) as error:  # the next look may do better; nothing is lost by waiting
            _log.error("what is idle could not be deleted: %s", type(error).__name__)
        await run_in_threadpool(_give_back_memory)


def _keep_few_heaps() -> None:
    """Let the threads that are still to come share HEAPS of glibc's heaps, which otherwise has eight for each core:
    arrays of megabytes that come and go leave holes in every one of them, and it keeps those."""
    with suppress(OSError):  # not glibc
        ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, HEAPS)


def _give_back_memory() -> None:
    """Return to the system what is free between living objects, in some 20 ms.

    Mapping each array by itself would leave no holes, but batches then cost half as much again in time.
    """
    with suppress(OSError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


_STATUS: tuple[tuple[type[IbisError], int], ...] = (
    (MissingError, 404),
    (FullError, 429),
    (TooLargeError, 413),
    (BusyError, 409),
    (SegmenterError, 503),
    (PolicyError, 503),
    (IbisError, 422),
)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(IbisError)
    async def failed(_request: Request, error: IbisError) -> JSONResponse:
        if (reason := no_room(error)) is not None:
            _log.error("%s", reason)
            return JSONResponse({"detail": reason}, status_code=507)
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        _log.info("refused with %d: %s", status, type(error).__name__)
        return JSONResponse({"detail": str(error)}, status_code=status)

    @app.exception_handler(OSError)
    @app.exception_handler(StarletteHTTPException)  # what a body that could not be kept for reading becomes
    async def broken(request: Request, error: OSError | StarletteHTTPException) -> Response:
        if (reason := no_room(error)) is not None:
            return JSONResponse({"detail": reason}, status_code=507)
        if isinstance(error, OSError):
            raise error
        return await http_exception_handler(request, error)

    @app.exception_handler(RequestValidationError)
    async def refused(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return JSONResponse({"detail": f"{where[:200]}: {first['msg']}"}, status_code=422)


def _add_open(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Health, metrics, models, and the description of the API."""

    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["state"])
    def ready() -> dict[str, str]:
        """Whether work can be taken: the models are loaded, the data folder can be written."""
        if (reason := service.trouble()) is not None:
            raise HTTPException(503, reason)
        return {"status": "ready"}

    @app.get("/metrics", tags=["state"], response_class=Response)
    def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", tags=["state"])
    def model_info() -> dict[str, Any]:
        """The loaded models with licences and hashes, the limits, the version."""
        return service.describe()

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))


def _add_segment(app: FastAPI, service: Service, threads: AgentThreads) -> None:
    @app.post("/v1/segment", tags=["segment"])
    async def segment(
        image: Annotated[UploadFile, File(description="PNG, JPEG, TIFF or BMP")],
        query: Annotated[str, Form(min_length=1, max_length=MAX_QUERY_CHARS)],
        max_turns: Annotated[int | None, Form(ge=1, le=1000)] = None,
        start_mask: Annotated[UploadFile | None, File(description="a mask to refine, 0 outside")] = None,
    ) -> SegmentView:
        """One run on one image; nothing is kept."""
        decoded, start = await _read_inputs(service, image, start_mask)
        session = await threads(lambda: service.segment(decoded, query, max_turns, start))
        [episode] = session.episodes()
        return SegmentView(
            ended=episode.stop,
            answer=episode.answer.answer,
            absent=list(episode.answer.absent),
            objects=asked_objects(episode),
            masks={name: encode_rle(mask) for name, mask in session.masks.items()},
            turns=[turn_view(number, step) for number, step in enumerate(session.steps, 1)],
        )


async def _read_inputs(service: Service, image: UploadFile, start_mask: UploadFile | None) -> tuple[Any, Mask | None]:
    content, name = await image.read(), image.filename or "image"
    decoded = await run_in_threadpool(service.read_upload, content, name)
    if start_mask is None:
        return decoded, None
    content, name = await start_mask.read(), start_mask.filename or "mask"
    return decoded, await run_in_threadpool(service.read_mask, content, name, decoded.size)


def _add_sessions(app: FastAPI, service: Service, threads: AgentThreads, metrics: Metrics) -> None:
    tags: Tags = ["sessions"]

    def own(id: str, request: Request) -> None:  # noqa: A002
        service.check_visitor(id, visitor_of(request))

    router = APIRouter(prefix="/v1/sessions/{id}", tags=tags, dependencies=[Depends(own)])

    @app.post("/v1/sessions", tags=tags, status_code=201)
    async def open_session(
        request: Request,
        image: Annotated[UploadFile, File(description="PNG, JPEG, TIFF or BMP")],
        query: Annotated[str, Form(min_length=1, max_length=MAX_QUERY_CHARS)],
        start_mask: Annotated[UploadFile | None, File(description="a mask to refine, 0 outside")] = None,
    ) -> SessionView:
        """Open a session on an image. It is kept until it is closed, unless nobody acts in it before it is idle.

        A browser's is its own alone.
        """
        decoded, start = await _read_inputs(service, image, start_mask)
        owner = visitor_of(request)
        return session_view(await run_in_threadpool(lambda: service.open(decoded, query, start, owner=owner)))

    @app.get("/v1/sessions", tags=tags)
    def list_sessions(request: Request) -> list[str]:
        """The ids of the open sessions, oldest use first; of those of the page, this browser's own."""
        return service.ids_for(visitor_of(request))

    @router.get("")
    def look(id: str) -> SessionView:  # noqa: A002
        """A session as it stands."""
        return session_view(service.session(id))

    @router.delete("", status_code=204)
    def close(id: str) -> None:  # noqa: A002
        """Close a session and delete its files."""
        service.close_session(id)

    _add_agent(router, service, threads, metrics)
    _add_user(router, service)
    _add_files(router, service)
    app.include_router(router)


def _add_agent(router: APIRouter, service: Service, threads: AgentThreads, metrics: Metrics) -> None:
    def run_steps(session: Session, asked: RunRequest, on_step: Callable[[Step], None] | None = None) -> RunEnd:
        def count(step: Step) -> None:
            metrics.turns.inc()
            if on_step is not None:
                on_step(step)

        turns = None if asked.max_turns is None else min(asked.max_turns, service.limits.turns)
        return session.run(asked.query, max_turns=turns, on_step=count, expected=asked.expected)

    @router.post("/ask")
    async def ask(id: str, asked: AskRequest) -> StepView:  # noqa: A002
        """One turn of the agent; "interrupted" where a user acted meanwhile."""
        session = await run_in_threadpool(service.session, id)
        step = await threads(lambda: session.ask(asked.query))
        metrics.turns.inc()
        return StepView(ended=None if step else "interrupted", session=session_view(session))

    @router.post("/run")
    async def run(id: str, asked: RunRequest) -> StepView:  # noqa: A002
        """Turns of the agent until it ends: stopped, max_turns, repeated, malformed or interrupted."""
        session = await run_in_threadpool(service.session, id)
        ended = await threads(lambda: run_steps(session, asked))
        return StepView(ended=ended, session=session_view(session))

    @router.post(
        "/run/stream",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "events turn ..., then end or error"}},
    )
    async def stream(id: str, asked: RunRequest) -> StreamingResponse:  # noqa: A002
        """As run, but every turn is sent as it is taken, as server-sent events. Whoever hangs up takes over."""
        session = await run_in_threadpool(service.session, id)
        if session.running:
            raise BusyError("the agent is at work in this session: wait, or take over first")
        return StreamingResponse(
            _events(session, threads, lambda on_step: run_steps(session, asked, on_step)),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},  # nginx passes turns on as they are taken
        )


def _add_user(router: APIRouter, service: Service) -> None:
    def after(id_: str, act: Callable[[Session], object]) -> SessionView:
        session = service.session(id_)
        act(session)
        return session_view(session)

    @router.post("/click")
    def click(id: str, asked: ClickRequest) -> SessionView:  # noqa: A002
        """A user's click."""
        return after(id, lambda session: session.click(asked.x, asked.y, positive=asked.positive, target=asked.target))

    @router.post("/box")
    def box(id: str, asked: BoxRequest) -> SessionView:  # noqa: A002
        """A user's box."""
        return after(id, lambda session: session.box(asked.x0, asked.y0, asked.x1, asked.y1, target=asked.target))

    @router.post("/accept")
    def accept(id: str, asked: AcceptRequest) -> SessionView:  # noqa: A002
        """A user says that the masks are right."""
        view = after(id, lambda session: session.accept(asked.answer, asked.absent))
        service.note_label()
        return view

    @router.post("/interrupt")
    def interrupt(id: str) -> SessionView:  # noqa: A002
        """End the agent's run; ask or run again to hand back."""
        return after(id, Session.interrupt)

    @router.post("/undo")
    def undo(id: str) -> SessionView:  # noqa: A002
        """Take back the newest turn with clicks or boxes."""
        return after(id, Session.undo)

    @router.post("/redo")
    def redo(id: str) -> SessionView:  # noqa: A002
        """Bring back what was undone."""
        return after(id, Session.redo)

    @router.post("/reset")
    def reset(id: str, asked: ResetRequest | None = None) -> SessionView:  # noqa: A002
        """Back to the beginning."""
        return after(id, lambda session: session.reset(expected=None if asked is None else asked.expected))

    @router.post("/fork", status_code=201)
    def fork(id: str, asked: ForkRequest) -> SessionView:  # noqa: A002
        """A new session from the first turns of this one."""
        return session_view(service.fork(id, asked.turn))


def _add_files(router: APIRouter, service: Service) -> None:
    @router.get("/mask", response_class=Response, responses=file_answer("image/png"))
    def mask(id: str, target: Annotated[str, Query(min_length=1, max_length=MAX_NAME_CHARS)]) -> Response:  # noqa: A002
        """One mask: the image's size, 0 outside and 255 inside."""
        session = service.session(id)
        masks = session.masks
        if target not in masks:
            raise MissingError(f"no target '{target}' in this session")
        return _download(session, png_bytes(masks[target]), f"mask_{target}.png", "image/png")

    @router.get("/image", response_class=Response, responses=file_answer("image/png"))
    def image(id: str) -> Response:  # noqa: A002
        """The image as the agent sees it."""
        return Response(service.session(id).png, media_type="image/png", headers=KEPT)

    @router.get("/overlay", response_class=Response, responses=file_answer("image/png"))
    def overlay_image(id: str) -> Response:  # noqa: A002
        """The image with its masks."""
        session = service.session(id)
        return Response(png_bytes(overlay(session.image, session.masks)), media_type="image/png")

    @router.get("/report", response_class=Response, responses=file_answer("text/html"))
    def report(id: str) -> Response:  # noqa: A002
        """The session as one HTML page."""
        session = service.session(id)
        return _download(session, session.report().encode(), "report.html", "text/html")

    @router.get("/record", response_class=Response, responses=file_answer("application/json"))
    def record(id: str) -> Response:  # noqa: A002
        """The latest round as a record, which 'ibisagent replay' plays again."""
        session = service.session(id)
        return _download(session, record_json(session.episodes()[-1]), "record.json", "application/json")

    @router.get("/export", response_class=Response, responses=file_answer("application/zip"))
    def export(id: str) -> Response:  # noqa: A002
        """Masks, overlay, records and report in a zip."""
        session = service.session(id)
        return _download(session, export_zip(service, session), "session.zip", "application/zip")

    @router.get("/training", response_class=Response, responses=file_answer("application/zip"))
    def training(id: str) -> Response:  # noqa: A002
        """What a user corrected, to train with, in a zip: episodes for SFT, image, masks and manifest for RL."""
        session = service.session(id)
        return _download(session, training_zip(service, session), "training.zip", "application/zip")


def _download(session: Session, content: bytes, ending: str, media_type: str) -> Response:
    """A file that a browser keeps, named after the image."""
    name = file_names([f"{Path(session.image.source or 'image').stem}_{Path(ending).stem}.x"])[0]
    return Response(content, media_type=media_type, headers=kept_as(name + Path(ending).suffix))


def kept_as(name: str) -> dict[str, str]:
    """The header that makes a browser keep an answer as a file of this name."""
    return {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}


async def _events(
    session: Session, threads: AgentThreads, run: Callable[[Callable[[Step], None]], RunEnd]
) -> AsyncIterator[str]:
    loop, steps = asyncio.get_running_loop(), asyncio.Queue[TurnView | None]()
    count = len(session.steps)
    lock = threading.Lock()

    def on_step(step: Step) -> None:
        nonlocal count
        with lock:
            count += 1
            loop.call_soon_threadsafe(steps.put_nowait, turn_view(count, step))

    def work() -> RunEnd:
        try:
            return run(on_step)
        finally:
            loop.call_soon_threadsafe(steps.put_nowait, None)

    ended = asyncio.ensure_future(threads(work))
    ended.add_done_callback(lambda run: run.cancelled() or run.exception())  # also where nobody is there to be told
    try:
        while True:
            try:
                view = await asyncio.wait_for(steps.get(), ALIVE_SECONDS)
            except TimeoutError:
                yield ": still at work\n\n"
                continue
            if view is None:
                break
            yield _event("turn", view.model_dump())
        try:
            yield _event("end", StepView(ended=await ended, session=session_view(session)).model_dump())
        except IbisError as error:
            yield _event("error", {"detail": str(error)})
    except (asyncio.CancelledError, GeneratorExit):
        session.interrupt()
        raise


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"
