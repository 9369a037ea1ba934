"""What an annotator has to do, without HTTP: sessions and scans in a row, how doubtful each is, one export of all.

The list is made of what lies in the folders of sessions and scans, so it is there again whenever the server is.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np

from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, DataError
from ibisagent.evaluation.reliability import expected_iou_of
from ibisagent.evaluation.selection import Candidate, choose, features_of
from ibisagent.files import file_names, make_folder, write_whole
from ibisagent.imaging.masks import rle_area, rle_box
from ibisagent.inference.rounds import SESSION_FILE, SessionSummary, State, summary_of
from ibisagent.inference.session import IMAGE_FILE, Session
from ibisagent.server.offers import Given
from ibisagent.server.scans import Scan, Scans
from ibisagent.server.service import Service
from ibisagent.server.storage import keep_if_possible, remove

ExportKind = Literal["coco", "png", "nifti", "seg", "training"]
THUMBNAIL_SIDE = 160  # pixels
RANKED = 50  # of the images that the agent has done: the most that one labels before they are ranked anew
_THUMBNAIL, _RELIABILITY = "thumbnail.jpg", "reliability.json"


@dataclass(frozen=True, slots=True)
class Item:
    """One image or scan to label. reliability: the expected IoU of what the agent made of it, in [0, 1]; None where
    that was not asked for, or a user has acted since. rank: its place, from 1, among those that are most worth
    labelling, see `selection`; None for others. created: seconds since 1970. stamp: when it was last changed, in
    nanoseconds; 0 where it is only offered so far, and opened False. given: what came with it, of a data set."""

    id: str
    kind: Literal["image", "scan"]
    name: str
    query: str
    state: State
    turns: int
    objects: tuple[str, ...]
    reliability: float | None
    running: bool
    created: float
    stamp: int
    rank: int | None = None
    opened: bool = True
    given: Given = ""


class Worklist:
    """The images and scans of everybody, each for whom it is. Safe to use from multiple threads."""

    def __init__(self, service: Service, scans: Scans) -> None:
        self._service, self._scans = service, scans
        self._context: dict[str, tuple[int, SessionSummary]] = {}
        self._eye = service.policy.inner  # by whose features images are compared, whatever is taught meanwhile
        self._eye_is = f"{self._eye.name} {package_version()}"
        self._features: dict[str, np.ndarray] = {}
        self._scores: dict[str, tuple[int, float]] = {}  # with the stamps that they are of

    def items(self, visitor: str | None) -> list[Item]:
        """What a visitor may see, oldest first."""
        return self._ranked(self._with_offers(self._items(self._service.ids_for(visitor), self._scans.of(visitor))))

    def of_everybody(self) -> list[Item]:
        """All that there is, oldest first."""
        return self._items(self._service.session_ids, self._scans.all)

    def _items(self, ids: Sequence[str], scans: Sequence[Scan]) -> list[Item]:
        slices = self._scans.slice_sessions
        for gone in self._context.keys() - set(self._service.session_ids):
            for kept in (self._context, self._features, self._scores):
                kept.pop(gone, None)
        images = [item for id_ in ids if id_ not in slices and (item := self._image(id_)) is not None]
        return sorted([*images, *map(self._scan, scans)], key=lambda item: item.created)

    def _with_offers(self, opened: Sequence[Item]) -> list[Item]:
        """With what the operator offers and nobody has opened so far."""
        items = {item.id: item for item in opened}
        for id_, offer in list(self._service.offers.items()):
            item = items.get(id_) or Item(
                id_, offer.kind, offer.name, offer.query, "new", 0, (), None, False, offer.created, 0, opened=False
            )
            items[id_] = replace(item, created=offer.created, given=offer.given)
        return sorted(items.values(), key=lambda item: item.created)

    def _ranked(self, items: Sequence[Item]) -> list[Item]:
        known = {item.id: self._features[item.id] for item in items if item.id in self._features}
        candidates = [
            Candidate(item.id, item.reliability, known[item.id])
            for item in items
            if item.reliability is not None and item.id in known
        ]
        labelled = [known[item.id] for item in items if item.state in ("corrected", "accepted") and item.id in known]
        chosen = choose(candidates, RANKED, labelled)
        ranks = {one.name: rank for rank, one in enumerate(chosen, 1)}
        return [replace(item, rank=ranks.get(item.id)) for item in items]

    def _image(self, id_: str) -> Item | None:
        folder = self._service.session_folder(id_)
        try:
            stamp = (folder / SESSION_FILE).stat().st_mtime_ns
            created = (folder / IMAGE_FILE).stat().st_mtime
            known = self._context.get(id_)
            if known is None or known[0] != stamp:
                known = self._context[id_] = (stamp, summary_of(folder))
        except (OSError, DataError):  # it is just being opened or closed
            return None
        seen = known[1]
        session = self._service.loaded(id_)
        running = session is not None and session.running
        kept = self._kept_score(id_, stamp)
        score = kept if seen.state == "agent" else None
        return Item(
            id_, "image", seen.source, seen.query, seen.state, seen.turns, seen.objects, score, running, created, stamp
        )

    def _scan(self, scan: Scan) -> Item:
        state, running = self._scans.state(scan), scan.progress is not None
        turns, stamp = len(scan.slices), self._scans.changed(scan)
        return Item(scan.id, "scan", scan.name, scan.query, state, turns, (), None, running, scan.created, stamp)

    def reliability(self, session: Session) -> float:
        """The expected IoU of the masks of a session, see `reliability`; kept until it changes. SegmenterError."""
        folder = session.folder
        stamp = 0 if folder is None else _changed(folder)
        known = self._kept_score(session.id, stamp) if stamp else None
        if known is not None:
            return known
        episode, image = session.episodes()[-1], session.image
        score = round(expected_iou_of(episode, image, session.query, session.policy, self._service.segmenter), 4)
        if folder is not None and stamp:
            features = features_of(self._eye, session.image)
            kept = {"stamp": stamp, "score": score, "by": self._eye_is, "features": features.tolist()}
            keep_if_possible(json.dumps(kept).encode(), folder / _RELIABILITY)
            self._features[session.id], self._scores[session.id] = features, (stamp, score)
        return score

    def _kept_score(self, id_: str, stamp: int) -> float | None:
        """The score as it was when the session's file was of `stamp`; what an earlier server kept is remembered."""
        if id_ not in self._scores:
            try:
                kept = json.loads((self._service.session_folder(id_) / _RELIABILITY).read_bytes())
                self._scores[id_] = int(kept["stamp"]), float(kept["score"])
                if kept["by"] == self._eye_is:
                    self._features[id_] = np.array(kept["features"], dtype=np.float32)
            except (OSError, ValueError, KeyError, TypeError):  # never asked for, or cut off
                return None
        known, score = self._scores[id_]
        return score if known == stamp else None

    def thumbnail(self, folder: Path, pixels: Callable[[], np.ndarray]) -> bytes:
        """A small JPEG of an image, made once. pixels: gives the image (H, W, 3)."""
        path = folder / _THUMBNAIL
        if path.is_file():
            return path.read_bytes()
        whole = pixels()
        scale = THUMBNAIL_SIDE / max(whole.shape[:2])
        size = [max(1, round(side * scale)) for side in whole.shape[1::-1]]
        small = cv2.resize(whole, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        content = cv2.imencode(".jpg", small[..., ::-1])[1].tobytes()
        keep_if_possible(content, path)
        return content

    # All that was accepted.

    @contextmanager
    def exported(self, visitor: str | None, kind: str) -> Iterator[Path]:
        """A zip of all that a visitor accepted, there for the block.

        "coco": images, and annotations.json with run lengths; "png": masks, overlay and record of each image;
        "training": what `read_cases` and `sft` read. Of scans: "seg" is DICOM where the source is, all but "training"
        give NIfTI for the others; nothing of one in which nothing was found. ConfigError for another kind, or where
        nothing is accepted.
        """
        if kind not in get_args(ExportKind):
            raise ConfigError(f"unknown format '{kind[:20]}': give one of {', '.join(get_args(ExportKind))}")
        accepted = [item for item in self.items(visitor) if item.state == "accepted"]
        images = [item for item in accepted if item.kind == "image" and kind not in ("nifti", "seg")]
        scans = [item for item in accepted if item.kind == "scan"]
        if not images and not scans:
            what = "scan" if kind in ("nifti", "seg") else "image or scan"
            raise ConfigError(f"no {what} is accepted yet: accept one first")
        folder = self._service.scratch()
        try:
            make_folder(folder)
            self._write_images(folder, [self._service.session(item.id) for item in images], kind)
            opened = [self._scans.get(item.id, visitor) for item in scans]
            for name, scan in zip(file_names([one.name.removesuffix(".gz") for one in opened]), opened, strict=True):
                form = kind if kind == "training" or (kind == "seg" and scan.dicom) else "nifti"
                self._scans.export(scan, folder if form == "training" else folder / "scans", name, form)
            if not any(folder.iterdir()):
                raise ConfigError("nothing that is accepted shows a mask: there is nothing to export")
            yield _zip(folder, folder.with_suffix(".zip"))
        finally:
            remove(folder)
            remove(folder.with_suffix(".zip"))

    def _write_images(self, folder: Path, sessions: Sequence[Session], kind: str) -> None:
        names = file_names([session.image.source or "image" for session in sessions])
        if kind == "training":
            for session in sessions:
                session.export_training(folder)
        elif kind == "png":
            for name, session in zip(names, sessions, strict=True):
                session.export(folder / "images", name)
        elif sessions:
            make_folder(folder / "images")
            for name, session in zip(names, sessions, strict=True):
                write_whole(session.png, folder / "images" / f"{name}.png")
            write_whole(json.dumps(_coco(names, sessions)).encode(), folder / "annotations.json")


def _coco(names: Sequence[str], sessions: Sequence[Session]) -> dict[str, Any]:
    """COCO's instance JSON, a run-length mask for each object that an image shows."""
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    categories: dict[str, int] = {}
    for number, (name, session) in enumerate(zip(names, sessions, strict=True), 1):
        height, width = session.image.size
        images.append({"id": number, "file_name": f"{name}.png", "height": height, "width": width})
        for target, code in session.answer_codes.items():
            if area := rle_area(code):
                category = categories.setdefault(target, len(categories) + 1)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "segmentation": dict(code),
                        "area": area,
                        "bbox": list(rle_box(code)),
                        "iscrowd": 0,
                    }
                )
    named = [{"id": number, "name": name} for name, number in categories.items()]
    return {"images": images, "annotations": annotations, "categories": named}


def _changed(folder: Path) -> int:
    """When a session was last changed, in nanoseconds; 0 where it is gone."""
    try:
        return (folder / SESSION_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path
