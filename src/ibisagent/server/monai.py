"""The endpoints of MONAI Label, as far as its clients in 3D Slicer and OHIF use them, after its public protocol.

`/info/`, `/infer/{model}`, `/session/`, `/datastore/`. One model, "ibisagent": what to segment its parameters say
in `query` (or `label`); with `foreground` and `background` points, [[x, y], ...] on a picture, they alone decide.
A mask comes back as a label map: PNG for pictures, on the volume's own grid for volumes.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, FastAPI, File, Form, Query, Response, UploadFile
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from ibisagent.domain import MAX_QUERY_CHARS, Image, Masks
from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import png_bytes
from ibisagent.inference.session import Session
from ibisagent.protocol import target_of
from ibisagent.server.app import AgentThreads
from ibisagent.server.service import VOLUME_SUFFIXES, FullError, MissingError, Service, VolumeLike, plain_name

MODEL = "ibisagent"
PICTURE = ".png"
Id = Annotated[str, Query(max_length=500)]
Point = Annotated[list[int], Field(min_length=2, max_length=3)]


class InferParameters(BaseModel):
    """What of a request's parameters is read; clients send others as well."""

    model_config = ConfigDict(extra="ignore")

    query: Annotated[str, Field(max_length=MAX_QUERY_CHARS)] = ""
    label: Annotated[str, Field(max_length=200)] = ""
    foreground: Annotated[list[Point], Field(max_length=64)] = []
    background: Annotated[list[Point], Field(max_length=64)] = []


@dataclass(eq=False)
class _Stored:
    """One image that a client sent, with its labels by tag; files lie in a folder of their own."""

    id: str
    name: str
    folder: Path
    file: Path
    labels: dict[str, Path] = field(default_factory=dict)
    infos: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    touched: float = field(default_factory=time.time)

    @property
    def session_info(self) -> dict[str, Any]:
        return {
            "name": self.id,
            "image": self.name,
            "meta": {},
            "create_ts": int(self.created),
            "last_access_ts": int(self.touched),
        }


class _Shelf:
    """What clients sent: bounded in number, forgotten when idle; ids are looked up and never become paths."""

    def __init__(self, service: Service, folder: str) -> None:
        self._service, self._name, self._folder = service, folder, service.folder / folder
        shutil.rmtree(self._folder, ignore_errors=True)  # it does not outlive the server
        self._kept: dict[str, _Stored] = {}
        self._lock = threading.Lock()

    def add(self, id_: str, content: bytes, name: str) -> _Stored:
        """Keep an image; one of the same id is replaced. DataError unless it can be read."""
        self.expire()
        read = _read(self._service, content, name)
        ending = PICTURE if isinstance(read, Image) else _ending(name)
        folder = self._folder / uuid.uuid4().hex
        with self._lock:
            if id_ not in self._kept and len(self._kept) >= self._service.limits.sessions:
                raise FullError(f"there are {len(self._kept)} images, more are not taken: delete one")
            self._service.private_folder(self._name)
            folder.mkdir()
            (folder / f"image{ending}").write_bytes(content)
            old = self._kept.get(id_)
            stored = self._kept[id_] = _Stored(id_, plain_name(name), folder, folder / f"image{ending}")
        if old is not None:
            shutil.rmtree(old.folder, ignore_errors=True)
        return stored

    def get(self, id_: str) -> _Stored:
        """MissingError where there is none."""
        stored = self._kept.get(id_)
        if stored is None:
            raise MissingError(f"no image or session '{id_[:40]}' here: send it first")
        stored.touched = time.time()
        return stored

    def remove(self, id_: str) -> _Stored:
        """MissingError where there is none."""
        with self._lock:
            stored = self.get(id_)
            del self._kept[id_]
        shutil.rmtree(stored.folder, ignore_errors=True)
        return stored

    def expire(self) -> None:
        """Forget what has been idle for too long."""
        limit = time.time() - self._service.limits.idle_seconds
        for id_ in [stored.id for stored in list(self._kept.values()) if stored.touched < limit]:
            self.remove(id_)

    @property
    def all(self) -> list[_Stored]:
        """Oldest first."""
        return list(self._kept.values())


def mount_monai(app: FastAPI, service: Service, threads: AgentThreads) -> None:
    """Add the endpoints to an application."""
    router = APIRouter(tags=["MONAI Label"])
    sessions, images = _Shelf(service, "monai-sessions"), _Shelf(service, "monai-images")
    _add_info(router, images)
    _add_sessions(router, sessions)
    _add_datastore(router, service, images)

    @router.post("/infer/{model}")
    async def infer(
        model: str,
        image: Id = "",
        session_id: Id = "",
        output: Literal["image", "json", "all"] | None = None,
        params: Annotated[str, Form(max_length=100_000)] = "{}",
        file: Annotated[UploadFile | None, File()] = None,
        label: Annotated[UploadFile | None, File()] = None,
    ) -> Response:
        """A label map for an image that was sent before, or comes along as `file`."""
        if model != MODEL:
            raise MissingError(f"no model '{model[:40]}' here: ask for '{MODEL}'")
        if label is not None:
            raise ConfigError("scribbles and labels to refine are not read here: send points or a query")
        asked = _parameters(params)
        if file is not None:
            content, name = await file.read(), file.filename or "image.nii.gz"
        elif session_id or image:
            stored = sessions.get(session_id) if session_id else images.get(image)
            content, name = await run_in_threadpool(stored.file.read_bytes), stored.file.name
        else:
            raise ConfigError("say which image: send it as 'file', or name it with 'image' or 'session_id'")
        masks, encode, ending = await threads(lambda: _infer(service, content, name, asked))
        facts = {"label_names": {name: number for number, name in enumerate(masks, 1)}}
        if output == "json":
            return Response(json.dumps(facts), media_type="application/json")
        encoded = await run_in_threadpool(encode)
        if output == "image":
            return Response(encoded, media_type="application/octet-stream")
        return _multipart(facts, f"label{ending}", encoded)

    app.include_router(router)


def _infer(
    service: Service, content: bytes, name: str, asked: InferParameters
) -> tuple[Masks, Callable[[], bytes], str]:
    """The masks, what encodes them as one file, and that file's ending."""
    query = asked.query.strip() or asked.label.strip()
    read = _read(service, content, name)
    if isinstance(read, Image):
        if asked.foreground or asked.background:
            session = service.open_unkept(read, query or "target")
            for points, positive in ((asked.foreground, True), (asked.background, False)):
                for x, y, *_ in points:
                    session.click(x, y, positive=positive, target=target_of(query) if query else "target")
        elif query:
            session = service.segment(read, query)
        else:
            raise ConfigError("say what to segment: params needs 'query', 'label' or 'foreground' points")
        return session.masks, lambda: _label_png(session), PICTURE
    if asked.foreground or asked.background:
        raise ConfigError("points on volumes are not read here: give a 'query', or send the slice as a picture")
    if not query:
        raise ConfigError("say what to segment: params needs 'query' or 'label'")
    formats = service.volumes
    if formats is None:
        raise ConfigError("this server reads pictures, not volumes")
    masks = formats.segment(read, query, service.policy, service.segmenter)

    def encode() -> bytes:
        path = service.scratch(".nii.gz")
        try:
            formats.write_masks(masks, read, path)
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)

    return masks, encode, ".nii.gz"


def _read(service: Service, content: bytes, name: str) -> Image | VolumeLike:
    return service.read_volume(content, name) if _ending(name) else service.read_picture(content, name)


def _ending(name: str) -> str:
    """The ending that makes a file a volume; "" for pictures."""
    found = [ending for ending in VOLUME_SUFFIXES if name.lower().endswith(ending)]
    return max(found, key=len, default="")


def _label_png(session: Session) -> bytes:
    labels = np.zeros(session.image.size, dtype=np.uint8)
    for number, mask in enumerate(session.masks.values(), 1):
        labels[mask] = number
    return png_bytes(labels)


def _parameters(text: str) -> InferParameters:
    try:
        return InferParameters.model_validate_json(text or "{}")
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"params {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error


def _multipart(facts: dict[str, Any], name: str, content: bytes) -> Response:
    """The two-part form that MONAI Label answers with."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n'
    file = (
        f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + json.dumps(facts).encode() + file.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return Response(body, media_type=f"multipart/form-data; boundary={boundary}")


def _add_info(router: APIRouter, images: _Shelf) -> None:
    @router.get("/info/")
    def info() -> dict[str, Any]:
        """The one model that there is, and how to ask it."""
        return {
            "name": "ibisagent",
            "description": "Segments what 'query' names. Research software: not for clinical use.",
            "version": package_version(),
            "labels": ["target"],
            "models": {
                MODEL: {
                    "type": "deepedit",
                    "labels": {"target": 1},
                    "dimension": 2,
                    "description": "A language model that clicks; set 'query' in its options",
                    "config": {"query": "", "label": ""},
                }
            },
            "trainers": {},
            "strategies": {},
            "scoring": {},
            "train_stats": {},
            "datastore": _stats(images),
        }


def _stats(images: _Shelf) -> dict[str, Any]:
    tags: dict[str, int] = {}
    for stored in images.all:
        for tag in stored.labels:
            tags[tag] = tags.get(tag, 0) + 1
    labelled = sum(bool(stored.labels) for stored in images.all)
    return {"total": len(images.all), "completed": labelled, "label_tags": tags}


def _add_sessions(router: APIRouter, sessions: _Shelf) -> None:
    @router.put("/session/")
    async def create(files: Annotated[list[UploadFile], File()]) -> dict[str, Any]:
        """Keep one image for the requests that follow."""
        if len(files) != 1:
            raise ConfigError(f"a session of {len(files)} files: send one, a series as NIfTI")
        content, name = await files[0].read(), files[0].filename or "image.nii.gz"
        stored = await run_in_threadpool(sessions.add, uuid.uuid4().hex, content, name)
        return {"session_id": stored.id, "session_info": stored.session_info}

    @router.get("/session/{session_id}")
    def look(session_id: str) -> dict[str, Any]:
        """What is known of a session."""
        return sessions.get(session_id).session_info

    @router.delete("/session/{session_id}")
    def remove(session_id: str) -> dict[str, Any]:
        """Forget a session, with its image."""
        return sessions.remove(session_id).session_info


def _add_datastore(router: APIRouter, service: Service, images: _Shelf) -> None:
    @router.get("/datastore/")
    def datastore(output: Literal["all", "stats", "train"] = "stats") -> dict[str, Any]:
        """How many images and labels there are, or which."""
        if output == "stats":
            return _stats(images)
        listed = {
            stored.id: {
                "image": {"ext": _ending(stored.file.name) or PICTURE, "info": {"name": stored.name}},
                "labels": {
                    tag: {"ext": path.suffix, "info": stored.infos.get(tag, {})} for tag, path in stored.labels.items()
                },
            }
            for stored in images.all
        }
        return {"name": "ibisagent", "description": "images that clients sent", "objects": listed}

    async def add(
        file: Annotated[UploadFile, File()], image: Id = "", params: Annotated[str, Form(max_length=100_000)] = "{}"
    ) -> dict[str, str]:
        """Keep an image."""
        _parameters(params)
        name = file.filename or "image.nii.gz"
        id_ = image or plain_name(name).removesuffix(_ending(name) or Path(name).suffix) or uuid.uuid4().hex
        stored = await run_in_threadpool(images.add, id_, await file.read(), name)
        return {"image": stored.id}

    router.put("/datastore/image")(add)
    router.put("/datastore/", include_in_schema=False)(add)

    @router.get("/datastore/image", response_class=Response)
    def download(image: Id) -> Response:
        """An image as it was sent."""
        stored = images.get(image)
        return _attached(stored.file)

    @router.head("/datastore/image", include_in_schema=False)
    def check(image: Id) -> Response:
        images.get(image)
        return Response()

    @router.get("/datastore/image/info")
    def image_info(image: Id) -> dict[str, Any]:
        """What is known of an image."""
        return {"name": images.get(image).name}

    @router.delete("/datastore/image")
    def remove(id: Id) -> dict[str, str]:  # noqa: A002
        """Forget an image with its labels."""
        images.remove(id)
        return {}

    @router.put("/datastore/label")
    async def save_label(
        image: Id,
        label: Annotated[UploadFile, File()],
        tag: Annotated[str, Query(max_length=100)] = "final",
        params: Annotated[str, Form(max_length=100_000)] = "{}",
    ) -> dict[str, str]:
        """Keep a label of an image."""
        stored = images.get(image)
        content, name = await label.read(), label.filename or "label.nii.gz"
        if len(content) > service.limits.upload_bytes or not content:
            raise DataError(f"{plain_name(name)}: {len(content)} bytes; give 1 to {service.limits.upload_bytes}")
        if tag not in stored.labels and len(stored.labels) >= 8:
            raise FullError("an image has eight labels at most: use one of the tags again")
        _parameters(params)
        path = stored.folder / f"label-{uuid.uuid4().hex}{_ending(name) or PICTURE}"
        await run_in_threadpool(path.write_bytes, content)
        old = stored.labels.get(tag)
        stored.labels[tag] = path
        if old is not None:
            old.unlink(missing_ok=True)
        return {"image": stored.id, "label": stored.id}

    @router.get("/datastore/label", response_class=Response)
    def download_label(label: Id, tag: Annotated[str, Query(max_length=100)] = "final") -> Response:
        """A label as it was sent."""
        stored = images.get(label)
        if tag not in stored.labels:
            raise MissingError(f"image '{label[:40]}' has no label '{tag}'")
        return _attached(stored.labels[tag])


def _attached(path: Path) -> Response:
    ending = _ending(path.name) or PICTURE
    name = f"{'label' if path.name.startswith('label') else 'image'}{ending}"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(path.read_bytes(), media_type="application/octet-stream", headers=headers)
