"""What clients of MONAI Label sent: images and their labels, which outlive the server."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ibisagent.domain import Image
from ibisagent.errors import DataError
from ibisagent.files import make_folder, write_whole
from ibisagent.server.service import VOLUME_SUFFIXES, FullError, MissingError, Service, VolumeLike, plain_name
from ibisagent.server.storage import note_use, used

IMAGE = ".png"
STORED_FILE = "stored.json"
MAX_LABELS = 8  # of one image
MAX_INFO_CHARS = 100_000  # of what a client says about a label
_LABEL_ENDINGS = (".seg.nrrd", *VOLUME_SUFFIXES, IMAGE, ".json", ".bin")
_FOLDER = re.compile(r"[0-9a-f]{32}")


@dataclass
class Label:
    """A label of an image. file: in the image's folder. ending: as the client named it. info: what it said of it."""

    file: str
    ending: str
    info: dict[str, Any]


@dataclass(eq=False)
class Stored:
    """One image that a client sent, or that was taken from a DICOMweb server; its files lie in a folder of its own.

    file: its name in the folder, a file or a folder of DICOM files. fetched: it can be had again. offered: when it was
    last given out to be labelled. reliability: expected IoU of what the agent makes of it, where that was asked for;
    judged_by: which agent that was.
    """

    id: str
    name: str
    folder: Path
    file: str
    created: float
    fetched: bool = False
    labels: dict[str, Label] = field(default_factory=dict)
    offered: float = 0.0
    reliability: float | None = None
    judged_by: str = ""

    @property
    def path(self) -> Path:
        """The image."""
        return self.folder / self.file

    @property
    def session_info(self) -> dict[str, Any]:
        """As clients know a session."""
        times = {"create_ts": int(self.created), "last_access_ts": int(used(self.folder))}
        return {"name": self.id, "image": self.name, "meta": {}, **times}


class ImageStore:
    """Images in one folder, bounded in number. Ids are looked up and never become paths. For multiple threads.

    passing: whether they go when they are idle, as clients send them again; else only those that were `fetched` and
    have no label do.
    """

    def __init__(self, service: Service, name: str, *, most: int, passing: bool) -> None:
        self._service, self._folder = service, service.private_folder(name)
        self._most, self._passing = most, passing
        self._lock = threading.RLock()
        self._kept = {stored.id: stored for stored in sorted(self._found(), key=lambda one: one.created)}
        service.also_expire.append(self.expire)

    def _found(self) -> list[Stored]:
        found = []
        for folder in self._folder.iterdir():
            if not _FOLDER.fullmatch(folder.name):
                continue  # not ours
            try:
                plain = json.loads((folder / STORED_FILE).read_bytes())
                plain["labels"] = {tag: Label(**label) for tag, label in plain["labels"].items()}
                found.append(Stored(folder=folder, **plain))
            except FileNotFoundError:
                shutil.rmtree(folder, ignore_errors=True)  # killed while it came
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # damaged: not shown, and not deleted either
        return found

    def add(self, id_: str, content: bytes, name: str) -> Stored:
        """Keep an image; one of the same id is replaced, and its labels stay. DataError unless it can be read."""
        read = read_upload(self._service, content, name)
        file = f"image{IMAGE if isinstance(read, Image) else volume_ending(name)}"
        return self._add(id_, plain_name(name), file, lambda path: write_whole(content, path), fetched=False)

    def add_series(self, id_: str, fetch: Callable[[Path], None]) -> Stored:
        """Keep a series of DICOM files that `fetch` writes into a folder."""

        def write(path: Path) -> None:
            make_folder(path)
            fetch(path)

        return self._add(id_, id_, "series", write, fetched=True)

    def _add(self, id_: str, name: str, file: str, write: Callable[[Path], None], *, fetched: bool) -> Stored:
        with self._lock:
            if id_ not in self._kept and len(self._kept) >= self._most:
                raise FullError(f"there are {len(self._kept)} images, more are not taken: delete one")
        stored = Stored(id_, name, self._folder / uuid.uuid4().hex, file, time.time(), fetched)
        try:
            stored.folder.mkdir()
            write(stored.path)
            with self._lock:
                old = self._kept.get(id_)
                if old is not None:  # what people drew stays
                    for tag, label in old.labels.items():
                        shutil.copyfile(old.folder / label.file, stored.folder / label.file)
                        stored.labels[tag] = label
                self.keep(stored)
                self._kept[id_] = stored
        except BaseException as error:
            shutil.rmtree(stored.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise DataError(f"'{name}': cannot be kept ({error.strerror})") from error
            raise
        if old is not None:
            shutil.rmtree(old.folder, ignore_errors=True)
        return stored

    def keep(self, stored: Stored) -> None:
        """Write down what has changed about an image."""
        plain = {one.name: getattr(stored, one.name) for one in fields(Stored) if one.name not in ("folder", "labels")}
        plain["labels"] = {tag: asdict(label) for tag, label in stored.labels.items()}
        write_whole(json.dumps(plain).encode(), stored.folder / STORED_FILE)

    def has(self, id_: str) -> bool:
        """Whether an image of that id is here."""
        return id_ in self._kept

    def get(self, id_: str) -> Stored:
        """This is a use of it. MissingError where there is none."""
        stored = self._kept.get(id_)
        if stored is None:
            raise MissingError(f"no image or session '{id_[:40]}' here: send it first")
        note_use(stored.folder)
        return stored

    def remove(self, id_: str) -> dict[str, Any]:
        """Forget an image with its labels; what there was to know of it. MissingError where there is none."""
        with self._lock:
            stored = self.get(id_)
            info = stored.session_info
            del self._kept[id_]
        shutil.rmtree(stored.folder, ignore_errors=True)
        return info

    def save_label(self, stored: Stored, tag: str, content: bytes, name: str, info: dict[str, Any]) -> Label:
        """Keep a label of an image; that of the same tag is replaced once the new one is on the disk."""
        shown = plain_name(name)
        self._service.check_bytes(content, shown)
        ending = _ending(shown, _LABEL_ENDINGS)
        if not ending:
            raise DataError(f"{shown}: is no kind of label; save it as one of {', '.join(_LABEL_ENDINGS)}")
        with self._lock:
            if tag not in stored.labels and len(stored.labels) >= MAX_LABELS:
                raise FullError(f"an image has {MAX_LABELS} labels at most: use one of the tags again")
            label = Label(f"label-{uuid.uuid4().hex}{ending}", ending, {**info, "ts": int(time.time()), "name": shown})
            write_whole(content, stored.folder / label.file)
            old = stored.labels.get(tag)
            stored.labels[tag] = label
            try:
                self.keep(stored)
            except DataError:
                stored.labels.pop(tag) if old is None else stored.labels.update({tag: old})
                (stored.folder / label.file).unlink(missing_ok=True)
                raise
            if old is not None:
                (stored.folder / old.file).unlink(missing_ok=True)
        return label

    def label(self, id_: str, tag: str) -> tuple[Stored, Label]:
        """A label with its image. MissingError where there is none."""
        stored = self.get(id_)
        if tag not in stored.labels:
            raise MissingError(f"image '{id_[:40]}' has no label '{tag[:40]}'")
        return stored, stored.labels[tag]

    def change_info(self, id_: str, tag: str, info: dict[str, Any]) -> dict[str, Any]:
        """Say more of a label; all that is said of it then. MissingError where there is none."""
        with self._lock:
            stored, label = self.label(id_, tag)
            changed = {**label.info, **info}
            if len(json.dumps(changed)) > MAX_INFO_CHARS:
                raise DataError(f"more than {MAX_INFO_CHARS} characters about a label: say less")
            label.info = changed
            self.keep(stored)
            return changed

    def remove_label(self, id_: str, tag: str) -> None:
        """Delete a label. MissingError where there is none."""
        with self._lock:
            stored, label = self.label(id_, tag)
            del stored.labels[tag]
            self.keep(stored)
            (stored.folder / label.file).unlink(missing_ok=True)

    def expire(self, idle: float, asked: float) -> int:
        """Delete what was not used since: `asked`, whatever it is; `idle`, what can be had again. See the class."""
        gone = 0
        for stored in self.all:
            last = used(stored.folder)
            again = self._passing or (stored.fetched and not stored.labels)
            if last < asked or (again and last < idle):
                self.remove(stored.id)
                gone += 1
        return gone

    @property
    def all(self) -> list[Stored]:
        """Oldest first."""
        with self._lock:
            return list(self._kept.values())


def read_upload(service: Service, content: bytes, name: str) -> Image | VolumeLike:
    """The image or volume in an upload, by the ending of its name. Errors as `Service.read_upload`."""
    return service.read_volume(content, name) if volume_ending(name) else service.read_upload(content, name)


def volume_ending(name: str) -> str:
    """The ending that makes a file a volume; "" for images."""
    return _ending(name, VOLUME_SUFFIXES)


def _ending(name: str, among: tuple[str, ...]) -> str:
    return max((one for one in among if name.lower().endswith(one)), key=len, default="")
