"""The endpoints of MONAI Label, as far as its clients in 3D Slicer and OHIF use them, after its public protocol.

`/info/`, `/infer/{model}`, `/session/`, `/datastore/`; those about learning are in `monai_learning`, the login in
`access`. Two models stand for the same agent, as clients have a place for each: MODEL takes clicks, and words where
there are none; TEXT_MODEL words alone. A mask comes back as a label map: PNG for images, NIfTI, NRRD or DICOM SEG on
the volume's own grid for volumes.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from fastapi import APIRouter, FastAPI, File, Form, Query, Response, UploadFile
from starlette.concurrency import run_in_threadpool

from ibisagent.domain import MAX_TARGETS, Image, Masks
from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import png_bytes
from ibisagent.server.app import AgentThreads
from ibisagent.server.auth import Keys
from ibisagent.server.monai_learning import STRATEGIES, add_learning
from ibisagent.server.monai_requests import InferParameters, read_info, read_parameters
from ibisagent.server.monai_store import IMAGE, MAX_INFO_CHARS, ImageStore, Stored, read_upload, volume_ending
from ibisagent.server.service import (
    MissingError,
    Service,
    VolumeFormats,
    VolumeLike,
    plain_name,
)
from ibisagent.volumes.dicomweb import Series, fetch_series, find_series

MODEL, TEXT_MODEL = "ibisagent", "ibisagent-text"
IMAGES_PER_SESSION = 10  # how many more images are kept to be labelled than sessions may be in use
READ_AGAIN = 2  # volumes that stay in memory between two clicks
Id = Annotated[str, Query(max_length=500)]
Tag = Annotated[str, Query(max_length=100)]
Info = Annotated[str, Form(max_length=MAX_INFO_CHARS)]
Output: TypeAlias = Literal["image", "json", "all", "dicom_seg"]
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_log = logging.getLogger("ibisagent.server")


def mount_monai(
    app: FastAPI,
    service: Service,
    threads: AgentThreads,
    *,
    labels: Sequence[str] = ("target",),
    studies: str | None = None,
) -> Callable[[], Any]:
    """Add the endpoints to an application.

    labels: what is asked for where a client names nothing, at most MAX_TARGETS. studies: the DICOMweb server whose
    series can be named by their SeriesInstanceUID. ConfigError for labels that are none.
    """
    if not 1 <= len(labels) <= MAX_TARGETS or not all(one.strip() and one.isprintable() for one in labels):
        raise ConfigError(f"{len(labels)} labels: give 1 to {MAX_TARGETS} names, each in one line")
    router = APIRouter(tags=["MONAI Label"])
    sessions = ImageStore(service, "monai-sessions", most=service.limits.sessions, passing=True)
    images = app.state.monai_images = ImageStore(
        service, "monai-images", most=IMAGES_PER_SESSION * service.limits.sessions, passing=False
    )
    archive = Archive(images, studies)
    _add_login(router, app.state.keys)
    _add_info(router, images, labels)
    _add_sessions(router, sessions)
    _add_datastore(router, service, images, archive)
    _add_infer(router, Inference(service, labels), sessions, archive, threads)
    started = add_learning(router, service, threads, images, archive.unlabelled, labels[0])
    app.include_router(router)
    return started


class Archive:
    """The images of the data folder, and behind them the series of a DICOMweb server, which are fetched on demand."""

    def __init__(self, images: ImageStore, studies: str | None) -> None:
        self._images, self._studies = images, studies
        self._lock = threading.Lock()

    def get(self, id_: str) -> Stored:
        """MissingError where there is no such image, ConfigError for a series where there is no server to ask."""
        if self._images.has(id_) or not _UID.fullmatch(id_):
            return self._images.get(id_)
        if self._studies is None:
            raise ConfigError(f"no image '{id_[:80]}' here: send it first, or start the server with --studies URL")
        with self._lock:  # two clients of one series wait for one copy
            if self._images.has(id_):
                return self._images.get(id_)
            found = find_series(self._studies, id_)
            if not found:
                raise MissingError(f"no series '{id_[:80]}' here, nor on the DICOMweb server")
            address = f"{self._studies.rstrip('/')}/studies/{found[0].study}/series/{id_}"
            return self._images.add_series(id_, lambda folder: fetch_series(address, folder))

    def unlabelled(self) -> list[Series]:
        """The series of the DICOMweb server, if there is one, of which no label is kept here."""
        listed = [] if self._studies is None else find_series(self._studies)
        return [one for one in listed if not (self._images.has(one.uid) and self._images.get(one.uid).labels)]


@dataclass(frozen=True)
class Answer:
    """Masks by name, those that show nothing apart; encode: makes a file of the ending and settings asked for."""

    masks: Masks
    absent: list[str]
    encode: Callable[[str], bytes]
    image: bool

    @property
    def facts(self) -> dict[str, Any]:
        """What is said beside the file. Values are numbered without gaps, as Slicer counts those that it finds."""
        names = {name: number for number, name in enumerate(self.masks, 1)}
        return {"label_names": names, "absent": self.absent, "centroids": {}}


class Inference:
    """Asks the agent, or the segmenter with a user's clicks, about images and volumes."""

    def __init__(self, service: Service, labels: Sequence[str]) -> None:
        self._service, self._labels = service, labels
        self._volumes: OrderedDict[Path, VolumeLike] = OrderedDict()
        self._lock = threading.Lock()

    def about(self, source: Stored | tuple[str, bytes], asked: InferParameters) -> Answer:
        """The answer about an image that is kept, or an upload (name, content)."""
        read = self._stored(source) if isinstance(source, Stored) else read_upload(self._service, source[1], source[0])
        masks = self._of_image(read, asked) if isinstance(read, Image) else self._of_volume(read, asked)
        shown = {name: mask for name, mask in masks.items() if mask.any()}
        absent = [name for name in masks if name not in shown]
        if isinstance(read, Image):
            size = read.size
            return Answer(shown, absent, lambda _ending: _label_png(shown, size), True)
        return Answer(shown, absent, lambda ending: self._encoded(shown, read, asked, ending), False)

    def _of_image(self, image: Image, asked: InferParameters) -> Masks:
        clicks = asked.clicks(self._labels)
        if not clicks:
            found: dict[str, Any] = {}
            for query in self._queries(asked):
                found |= self._service.segment(image, query).masks
            return found
        session = self._service.open_unkept(image, clicks[0].target)
        for click in clicks:
            session.click(click.voxel[0], click.voxel[1], positive=click.positive, target=click.target)
        return session.masks

    def _of_volume(self, volume: VolumeLike, asked: InferParameters) -> Masks:
        formats, segmenter = self._formats(), self._service.segmenter
        if asked.has_flat_points:
            raise ConfigError("a point of a volume is [i, j, k]: send three numbers")
        clicks = asked.clicks(self._labels)
        if clicks:
            return formats.click(volume, clicks, segmenter, self._service.go_on, through=asked.carried)
        found: dict[str, Any] = {}
        for query in self._queries(asked):
            found |= formats.segment(volume, query, self._service.policy, segmenter, self._service.go_on)
        return found

    def _queries(self, asked: InferParameters) -> Sequence[str]:
        """The request; else a label that the client names; else the model's own."""
        query = asked.query.strip() or asked.label.strip()
        return [query] if query else self._labels

    def _stored(self, stored: Stored) -> Image | VolumeLike:
        if not stored.path.is_dir() and not volume_ending(stored.file):
            return self._service.read_upload(stored.path.read_bytes(), stored.file)
        with self._lock:
            if stored.path in self._volumes:
                self._volumes.move_to_end(stored.path)
                return self._volumes[stored.path]
        try:
            with self._service.reading():
                volume = self._formats().read(stored.path)
        except DataError as error:
            raise type(error)(str(error).replace(str(stored.path), stored.name)) from error
        with self._lock:
            self._volumes[stored.path] = volume
            while len(self._volumes) > READ_AGAIN:
                self._volumes.popitem(last=False)
        return volume

    def _formats(self) -> VolumeFormats:
        if self._service.volumes is None:
            raise ConfigError("this server reads images, not volumes")
        return self._service.volumes

    def _encoded(self, masks: Masks, volume: VolumeLike, asked: InferParameters, ending: str) -> bytes:
        path = self._service.scratch(ending)
        try:
            self._formats().write_masks(masks, volume, path, dtype=asked.result_dtype, compressed=asked.result_compress)
            return path.read_bytes()
        except DataError as error:
            raise type(error)(str(error).replace(str(path), "the answer")) from error
        finally:
            path.unlink(missing_ok=True)


def _add_infer(
    router: APIRouter, inference: Inference, sessions: ImageStore, archive: Archive, threads: AgentThreads
) -> None:
    @router.post("/infer/{model}")
    async def infer(
        model: str,
        image: Id = "",
        session_id: Id = "",
        output: Output | None = None,
        params: Info = "{}",
        file: Annotated[UploadFile | None, File()] = None,
        label: Annotated[UploadFile | None, File()] = None,
    ) -> Response:
        """A label map for an image that was sent before, or comes along as `file`.

        Without `output` a volume's label map is .nii.gz: 3D Slicer asks for .nrrd, but reads what the file's name says.
        """
        if model not in (MODEL, TEXT_MODEL):
            raise MissingError(f"no model '{model[:40]}' here: ask for '{MODEL}'")
        if label is not None:
            raise ConfigError("scribbles and labels to refine are not read here: send points or a query")
        asked, began = read_parameters(params), time.monotonic()
        if file is not None:
            source: Stored | tuple[str, bytes] = (file.filename or "image.nii.gz", await file.read())
        elif session_id or image:
            source = await threads(lambda: sessions.get(session_id) if session_id else archive.get(image))
        else:
            raise ConfigError("say which image: send it as 'file', or name it with 'image' or 'session_id'")
        answer = await threads(lambda: inference.about(source, asked))
        _log.info("infer %s: %d masks in %.1f s", model, len(answer.masks), time.monotonic() - began)
        if output == "json":
            return Response(json.dumps(answer.facts), media_type="application/json")
        if output == "dicom_seg" and not (isinstance(source, Stored) and source.path.is_dir()):
            raise ConfigError("a DICOM segmentation needs a series of a DICOMweb server (--studies): ask for 'image'")
        ending = _ending_for(answer, output, asked)
        encoded = await run_in_threadpool(answer.encode, ending)
        if output in ("image", "dicom_seg"):
            media_type = "application/dicom" if output == "dicom_seg" else "application/octet-stream"
            return Response(encoded, media_type=media_type)
        return _multipart(answer.facts, f"label{ending}", encoded)


def _ending_for(answer: Answer, output: Output | None, asked: InferParameters) -> str:
    if answer.image:
        return IMAGE
    if output == "dicom_seg":
        return ".dcm"
    return ".nii.gz" if output is None else asked.result_extension


def _label_png(masks: Masks, size: tuple[int, int]) -> bytes:
    labels = np.zeros(size, dtype=np.uint8)
    for number, mask in enumerate(masks.values(), 1):
        labels[mask] = number
    return png_bytes(labels)


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


def _add_login(router: APIRouter, keys: Keys) -> None:
    """What Slicer's module asks before it asks for a password; where a token is needed, the middleware answers the
    second."""

    @router.get("/auth/")
    def asked() -> dict[str, bool]:
        """Whether a token is needed."""
        return {"enabled": keys.needed}

    @router.post("/auth/token")
    def none_needed() -> dict[str, None]:
        """The token for a password, which is the token itself; none is needed here."""
        return {"access_token": None, "token_type": None}

    @router.get("/auth/token/valid")
    def valid() -> dict[str, str]:
        """Answered to whoever sent the token."""
        return {"username": "user"}


def _add_info(router: APIRouter, images: ImageStore, labels: Sequence[str]) -> None:
    numbered = {name: number for number, name in enumerate(labels, 1)}
    words = {"query": ""}

    @router.get("/info/")
    def info() -> dict[str, Any]:
        """The models and how to ask them. Their options are what a client sends back as parameters."""
        return {
            "name": "ibisagent",
            "description": "Segments what 'query' names. Research software: not for clinical use.",
            "version": package_version(),
            "labels": list(labels),
            "models": {
                MODEL: {
                    "type": "deepgrow",
                    "labels": numbered,
                    "dimension": 3,
                    "description": "Click, or set 'query' in the options; extent: what a click is carried through",
                    "config": {**words, "extent": ["volume", "slice"]},
                },
                TEXT_MODEL: {
                    "type": "segmentation",
                    "labels": numbered,
                    "dimension": 3,
                    "description": "A language model that clicks; say what in 'query', in the options",
                    "config": words,
                },
            },
            "trainers": {MODEL: {"description": "Learns the objects of the labels that were submitted", "config": {}}},
            "strategies": {name: {"description": what} for name, what in STRATEGIES.items()},
            "scoring": {},
            "train_stats": {},
            "datastore": _stats(images),
        }


def _stats(images: ImageStore) -> dict[str, Any]:
    everything = images.all
    tags = [tag for stored in everything for tag in stored.labels]
    labelled = sum(bool(stored.labels) for stored in everything)
    return {"total": len(everything), "completed": labelled, "label_tags": {tag: tags.count(tag) for tag in set(tags)}}


def _add_sessions(router: APIRouter, sessions: ImageStore) -> None:
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
        return sessions.remove(session_id)


def _add_datastore(router: APIRouter, service: Service, images: ImageStore, archive: Archive) -> None:
    @router.get("/datastore/")
    def datastore(output: Literal["all", "stats", "train"] = "stats") -> dict[str, Any]:
        """How many images and labels there are, or which."""
        if output == "stats":
            return _stats(images)
        listed = {
            stored.id: {
                "image": {"ext": volume_ending(stored.file) or IMAGE, "info": {"name": stored.name}},
                "labels": {tag: {"ext": label.ending, "info": label.info} for tag, label in stored.labels.items()},
            }
            for stored in images.all
        }
        return {"name": "ibisagent", "description": "images that clients sent", "objects": listed}

    async def add(file: Annotated[UploadFile, File()], image: Id = "", params: Info = "{}") -> dict[str, str]:
        """Keep an image until it is deleted."""
        read_info(params)
        name = file.filename or "image.nii.gz"
        id_ = image or plain_name(name).removesuffix(volume_ending(name) or Path(name).suffix) or uuid.uuid4().hex
        stored = await run_in_threadpool(images.add, id_, await file.read(), name)
        return {"image": stored.id}

    router.put("/datastore/image")(add)
    router.put("/datastore/", include_in_schema=False)(add)

    @router.get("/datastore/image", response_class=Response)
    def download(image: Id) -> Response:
        """An image as it was sent."""
        stored = archive.get(image)
        if stored.path.is_dir():
            raise ConfigError("this is a series of the DICOMweb server: take it from there")
        return _attached(stored.path, "image", volume_ending(stored.file) or IMAGE)

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

    _add_labels(router, service, images, archive)


def _add_labels(router: APIRouter, service: Service, images: ImageStore, archive: Archive) -> None:
    @router.put("/datastore/label")
    async def save(
        image: Id, label: Annotated[UploadFile, File()], tag: Tag = "final", params: Info = "{}"
    ) -> dict[str, str]:
        """Keep a label of an image, with what `params` says of it: label_info, the names of its values."""
        said = read_info(params)
        stored = await run_in_threadpool(archive.get, image)
        content, name = await label.read(), label.filename or "label.nii.gz"
        await run_in_threadpool(images.save_label, stored, tag or "final", content, name, said)
        await run_in_threadpool(service.note_label)
        return {"image": stored.id, "label": stored.id}

    @router.get("/datastore/label", response_class=Response)
    def download(label: Id, tag: Tag = "final") -> Response:
        """A label as it was sent."""
        stored, kept = images.label(label, tag)
        return _attached(stored.folder / kept.file, "label", kept.ending)

    @router.head("/datastore/label", include_in_schema=False)
    def check(image: Id, tag: Tag = "final") -> Response:
        images.label(image, tag)
        return Response()

    @router.delete("/datastore/label")
    def remove(id: Id, tag: Tag = "final") -> dict[str, str]:  # noqa: A002
        """Delete a label."""
        images.remove_label(id, tag)
        return {}

    @router.get("/datastore/label/info")
    def label_info(label: Id, tag: Tag = "final") -> dict[str, Any]:
        """What was said of a label when it was saved."""
        return images.label(label, tag)[1].info

    @router.put("/datastore/label/info")
    def change_info(label: Id, info: Info = "{}", tag: Tag = "final") -> dict[str, Any]:
        """Say more of a label, as the reviewer module does: its state, for one."""
        return images.change_info(label, tag, read_info(info))


def _attached(path: Path, name: str, ending: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}{ending}"'}
    return Response(path.read_bytes(), media_type="application/octet-stream", headers=headers)
