"""HTTP for an annotator's day: brush, preview and names of objects, the worklist, scans slice by slice, one export.

What the page needs beside sessions; programs can use it as well. Whose a session or scan is, is asked at every address.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from ibisagent.domain import MAX_QUERY_CHARS, Masks
from ibisagent.files import png_bytes
from ibisagent.imaging.masks import encode_rle, rle_area
from ibisagent.inference.session import Session
from ibisagent.server.app import KEPT, AgentThreads, kept_as
from ibisagent.server.auth import visitor_of
from ibisagent.server.job_routes import file_answer
from ibisagent.server.scans import Scan, Scans
from ibisagent.server.schemas import (
    ClickRequest,
    QueryText,
    SessionView,
    StrictBody,
    TargetName,
    TargetView,
    session_view,
)
from ibisagent.server.service import Service
from ibisagent.server.worklist import Worklist

MAX_POINTS = 5000  # of one stroke
AxisName = Annotated[str, Query(max_length=20)]
SliceNumber = Annotated[int, Query(ge=0, le=100_000)]
WindowText = Annotated[str, Query(max_length=40)]


class BrushRequest(StrictBody):
    """A stroke of a round brush: where it went (pixels; the middle of the first one is 0.5, 0.5), and its radius."""

    points: Annotated[list[tuple[float, float]], Field(min_length=1, max_length=MAX_POINTS)]
    radius: Annotated[float, Field(ge=0, le=10_000)]
    add: bool = True
    target: TargetName | None = None


class RenameRequest(StrictBody):
    """Another name for an object."""

    target: TargetName
    name: TargetName


class RemoveRequest(StrictBody):
    """An object that is not to be there any more."""

    target: TargetName


class QueryRequest(StrictBody):
    """A request."""

    query: QueryText


class PlaceRequest(StrictBody):
    """A slice of a scan. window: at which its image is made where it has none yet."""

    axis: Annotated[str, Field(max_length=20)]
    index: Annotated[int, Field(ge=0, le=100_000, strict=True)]
    window: Annotated[str, Field(max_length=40)] = "auto"


class FindRequest(StrictBody):
    """What the agent is to look for in a whole scan. axis: along which; left out, the scan's first."""

    query: QueryText
    axis: Annotated[str, Field(max_length=20)] | None = None


class ItemView(BaseModel):
    """An image (a session) or a scan to label.

    reliability: the expected IoU where only the agent has acted, if it was asked for. rank: its place among those that
    are most worth labelling, from 1. state: "new", "agent", "corrected" or "accepted". created: seconds since 1970.
    opened: False where the operator only offers it so far; it is opened by looking at it. given: what came with it of a
    data set: nothing (""), its "query", its "masks" as well.
    """

    id: str
    kind: str
    name: str
    query: str
    state: str
    turns: int
    objects: list[str]
    reliability: float | None
    running: bool
    created: float
    rank: int | None
    opened: bool
    given: str


class AxisView(BaseModel):
    """A direction to look along. count: slices; height, width: of their images, in pixels."""

    name: str
    count: int
    height: int
    width: int


class ScanView(BaseModel):
    """A scan as it stands. windows: level and width by name. progress: slices done, and of how many about,
    while masks are carried on or found. doubted: axis and number of slices to look at."""

    id: str
    name: str
    query: str
    state: str
    dicom: bool
    axes: list[AxisView]
    windows: dict[str, tuple[float, float]]
    doubted: list[tuple[str, int]]
    progress: tuple[int, int] | None
    can_undo: bool


class SliceView(BaseModel):
    """A slice of a scan: the masks of the volume there, and its session, where somebody has acted in it."""

    targets: list[TargetView]
    session: SessionView | None


def _own_session(id: str, request: Request) -> Session:  # noqa: A002
    service: Service = request.app.state.service
    service.check_visitor(id, visitor_of(request))
    return service.session(id)


def _own_scan(id: str, request: Request) -> Scan:  # noqa: A002
    scans: Scans = request.app.state.scans
    return scans.get(id, visitor_of(request))


OwnSession = Annotated[Session, Depends(_own_session)]
OwnScan = Annotated[Scan, Depends(_own_scan)]


def mount_annotate(app: FastAPI, service: Service, threads: AgentThreads) -> None:
    """Add the addresses to the application."""
    scans = app.state.scans = Scans(service)
    worklist = app.state.worklist = Worklist(service, scans)
    _add_session_acts(app, service, worklist)
    _add_worklist(app, worklist)
    _add_scans(app, service, scans, worklist, threads)


def _targets(masks: Masks) -> list[TargetView]:
    codes = {name: encode_rle(mask) for name, mask in masks.items()}
    return [TargetView(name=name, pixels=rle_area(code), mask=code) for name, code in codes.items()]


def _add_session_acts(app: FastAPI, service: Service, worklist: Worklist) -> None:
    router = APIRouter(prefix="/v1/sessions/{id}", tags=["sessions"])

    @router.post("/query")
    def query(session: OwnSession, asked: QueryRequest) -> SessionView:
        """Another request, as 'ask' takes it, and nobody acts on it yet."""
        session.request(asked.query)
        return session_view(session)

    @router.post("/brush")
    def brush(session: OwnSession, asked: BrushRequest) -> SessionView:
        """A stroke adds pixels to a mask, or takes them away."""
        session.brush(asked.points, asked.radius, add=asked.add, target=asked.target)
        return session_view(session)

    @router.post("/rename")
    def rename(session: OwnSession, asked: RenameRequest) -> SessionView:
        """Call an object otherwise."""
        session.rename(asked.target, asked.name)
        return session_view(session)

    @router.post("/remove")
    def remove(session: OwnSession, asked: RemoveRequest) -> SessionView:
        """Drop an object with its mask."""
        session.remove(asked.target)
        return session_view(session)

    @router.post("/preview")
    def preview(session: OwnSession, asked: ClickRequest) -> TargetView:
        """The mask that a click would give; nothing changes."""
        mask = session.preview(asked.x, asked.y, positive=asked.positive, target=asked.target)
        [view] = _targets({asked.target or session.target: mask})
        return view

    @router.get("/masks")
    def masks(session: OwnSession, turn: Annotated[int, Query(ge=0, le=100_000)]) -> list[TargetView]:
        """The masks as they were after so many turns."""
        return _targets(session.fork(turn).masks)

    @router.get("/reliability")
    def reliability(session: OwnSession) -> float:
        """The expected IoU of the masks, in [0, 1], see docs/reference/reliability.md; takes some predictions."""
        return worklist.reliability(session)

    @router.get("/thumbnail", response_class=Response, responses=file_answer("image/jpeg"))
    def thumbnail(session: OwnSession) -> Response:
        """The image, small."""
        content = worklist.thumbnail(service.session_folder(session.id), lambda: session.image.pixels)
        return Response(content, media_type="image/jpeg", headers=KEPT)

    app.include_router(router)


def _add_worklist(app: FastAPI, worklist: Worklist) -> None:
    @app.get("/v1/worklist", tags=["worklist"])
    def items(request: Request) -> list[ItemView]:
        """The images and scans to label, oldest first: a browser's own, and those that all share."""
        found = worklist.items(visitor_of(request))
        return [ItemView.model_validate(item, from_attributes=True) for item in found]

    @app.get(
        "/v1/worklist/export", tags=["worklist"], response_class=FileResponse, responses=file_answer("application/zip")
    )
    def export(
        request: Request,
        format: Annotated[str, Query(max_length=20)] = "coco",  # noqa: A002
    ) -> FileResponse:
        """All accepted masks in a zip: "coco", "png", "training" (what 'eval run' and 'sft' read), "nifti" or "seg"."""
        there = ExitStack()
        path = there.enter_context(worklist.exported(visitor_of(request), format))
        headers = kept_as(f"masks_{format}.zip")
        return FileResponse(path, media_type="application/zip", headers=headers, background=BackgroundTask(there.close))


def _scan_view(scans: Scans, scan: Scan) -> ScanView:
    names = ("id", "name", "query", "dicom", "windows", "doubted", "progress")
    plain: dict[str, Any] = {name: getattr(scan, name) for name in names}
    axes = [AxisView.model_validate(axis, from_attributes=True) for axis in scan.axes]
    return ScanView(axes=axes, state=scans.state(scan), can_undo=scans.can_undo(scan), **plain)


def _add_scans(app: FastAPI, service: Service, scans: Scans, worklist: Worklist, threads: AgentThreads) -> None:
    router = APIRouter(prefix="/v1/scans", tags=["scans"])

    @router.post("", status_code=201)
    async def open_scan(
        request: Request,
        files: Annotated[list[UploadFile], File(description="NIfTI, NRRD, MetaImage, or the DICOM files of a series")],
        query: Annotated[str, Form(min_length=1, max_length=MAX_QUERY_CHARS)],
    ) -> ScanView:
        """Open a scan, to be labelled slice by slice. It is kept until it is deleted."""
        uploads = [(file.filename or "scan", await file.read()) for file in files]
        return _scan_view(scans, await run_in_threadpool(scans.open, uploads, query, visitor_of(request)))

    @router.get("/{id}")
    def look(scan: OwnScan) -> ScanView:
        """A scan as it stands."""
        return _scan_view(scans, scan)

    @router.delete("/{id}", status_code=204)
    def close(scan: OwnScan) -> None:
        """Delete a scan with all that was made of it."""
        scans.close(scan)

    @router.get("/{id}/image", response_class=Response, responses=file_answer("image/png"))
    def image(scan: OwnScan, axis: AxisName, index: SliceNumber, window: WindowText = "auto") -> Response:
        """A slice. window: a name, LEVEL/WIDTH or LOW-HIGH%."""
        pixels = scans.image(scan, axis, index, window).pixels
        grey = bool((pixels[..., :1] == pixels).all())
        return Response(png_bytes(pixels[..., 0] if grey else pixels), media_type="image/png", headers=KEPT)

    @router.get("/{id}/slice")
    def at(scan: OwnScan, axis: AxisName, index: SliceNumber) -> SliceView:
        """What there is on a slice."""
        session = scans.slice_session(scan, axis, index)
        shown = None if session is None else session_view(session)
        return SliceView(targets=_targets(scans.masks(scan, axis, index)), session=shown)

    @router.get("/{id}/shown")
    def shown(scan: OwnScan, axis: AxisName) -> dict[int, bool]:
        """The slices that show a mask, or on which somebody acted, by number: whether somebody did."""
        return scans.shown_slices(scan, axis)

    @router.get("/{id}/thumbnail", response_class=Response, responses=file_answer("image/jpeg"))
    def thumbnail(scan: OwnScan) -> Response:
        """The middle slice, small."""
        main = scan.axes[0]
        pixels = lambda: scans.image(scan, main.name, main.count // 2, "auto").pixels  # noqa: E731
        return Response(worklist.thumbnail(scans.folder(scan), pixels), media_type="image/jpeg", headers=KEPT)

    _add_scan_acts(router, service, scans, threads)
    app.include_router(router)


def _add_scan_acts(router: APIRouter, service: Service, scans: Scans, threads: AgentThreads) -> None:
    @router.post("/{id}/session")
    def session(scan: OwnScan, asked: PlaceRequest) -> SessionView:
        """The session of a slice, to act in; opened if need be, with the masks that the volume has there."""
        return session_view(scans.session_to_act_in(scan, asked.axis, asked.index, asked.window))

    @router.post("/{id}/propagate")
    async def propagate(scan: OwnScan, asked: PlaceRequest) -> ScanView:
        """Carry the masks of a slice, and of those that were worked on along this axis, to all others."""
        await threads(lambda: scans.propagate(scan, asked.axis, asked.index))
        return _scan_view(scans, scan)

    @router.post("/{id}/find")
    async def find(scan: OwnScan, asked: FindRequest) -> ScanView:
        """Let the agent look for an object in the whole scan."""

        def work() -> None:
            scans.ask(scan, asked.query)
            scans.find(scan, asked.axis or scan.axes[0].name)

        await threads(work)
        return _scan_view(scans, scan)

    @router.post("/{id}/query")
    def query(scan: OwnScan, asked: QueryRequest) -> ScanView:
        """Another request, for slices that are opened from now on."""
        scans.ask(scan, asked.query)
        return _scan_view(scans, scan)

    @router.post("/{id}/undo")
    def undo(scan: OwnScan) -> ScanView:
        """Take back what was carried on or found last."""
        scans.undo(scan)
        return _scan_view(scans, scan)

    @router.post("/{id}/accept")
    def accept(scan: OwnScan) -> ScanView:
        """A user says that the masks of the whole scan are right."""
        scans.accept(scan)
        service.note_label()
        return _scan_view(scans, scan)
