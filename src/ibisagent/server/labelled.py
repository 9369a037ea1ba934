"""What users accepted or corrected, as images and masks that an agent can learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ibisagent.domain import Image, Masks
from ibisagent.files import make_folder, write_whole
from ibisagent.imaging.images import read_image, read_masks
from ibisagent.inference.corrections import add_to_data_set
from ibisagent.inference.session import Session
from ibisagent.server.monai_store import IMAGE, ImageStore, Label, Stored, volume_ending
from ibisagent.server.scans import Scan, Scans
from ibisagent.server.service import PASSING_FILE, Service
from ibisagent.server.storage import remove
from ibisagent.server.worklist import Item, Worklist
from ibisagent.volumes import SliceView, read_volume
from ibisagent.volumes.writing import masks_on

UNNAMED = "target"  # what an object is called of which nobody has said what it is: there is nothing to learn from it
SLICES = 8  # of one scan: its neighbours say the same again
FINAL = "final"  # tag of the labels that users of MONAI Label submit


@dataclass(frozen=True, slots=True)
class Labelled:
    """One image or scan with masks that a user left as they should be.

    key: other whenever the masks are. accepted: a user said that they are right. write: adds it to the data set in a
    folder, and says how many images that were; DataError where it cannot be read or written.
    """

    key: str
    accepted: bool
    write: Callable[[Path], int]


class LabelledImages:
    """All examples of a server, of whoever made them."""

    def __init__(self, service: Service, worklist: Worklist, scans: Scans, images: ImageStore) -> None:
        self._service, self._worklist, self._scans, self._images = service, worklist, scans, images

    def __iter__(self) -> Iterator[Labelled]:
        """As they stand now, oldest first; nothing is decoded."""
        for item in self._worklist.of_everybody():
            if item.state in ("accepted", "corrected") and not self._is_of_a_program(item):
                yield self._of_scan(item) if item.kind == "scan" else self._of_session(item)
        for stored in self._images.all:
            if (label := stored.labels.get(FINAL)) is not None:
                yield Labelled(f"{stored.id} {label.file}", True, _Submitted(self._service, stored, label).write)

    def _is_of_a_program(self, item: Item) -> bool:
        """Whether another agent acted there, over MCP: it is no user, and may be wrong as the agent itself is."""
        return item.kind == "image" and (self._service.session_folder(item.id) / PASSING_FILE).exists()

    def _of_session(self, item: Item) -> Labelled:
        accepted = item.state == "accepted"
        return Labelled(
            f"{item.id} {item.stamp}",
            accepted,
            lambda folder: _add_session(folder, self._session(item.id), accepted=accepted),
        )

    def _of_scan(self, item: Item) -> Labelled:
        accepted = item.state == "accepted"

        def write(folder: Path) -> int:
            scan = next(one for one in self._scans.all if one.id == item.id)
            if accepted:
                return self._add_scan(folder, scan)
            sessions = [self._session(id_) for id_ in scan.slices.values()]
            acted = [one for one in sessions if one.state in ("accepted", "corrected")]
            return sum(_add_session(folder, one, accepted=False, patient=scan.id) for one in acted)

        return Labelled(f"{item.id} {item.stamp}", accepted, write)

    def _session(self, id_: str) -> Session:
        """A session; to learn from it is no use of it, so it is read from the disk where it is not in memory."""
        return self._service.loaded(id_) or Session.load(self._service.session_folder(id_), self._service.segmenter)

    def _add_scan(self, folder: Path, scan: Scan) -> int:
        axis = scan.axes[0].name
        shown = [(index, self._scans.masks(scan, axis, index)) for index in self._scans.shown_slices(scan, axis)]
        return sum(
            _add(folder, self._scans.image(scan, axis, index, "auto"), masks, scan.id)
            for index, masks in spread([(index, masks) for index, masks in shown if masks])
        )


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A label that a client of MONAI Label submitted, and its image."""

    service: Service
    stored: Stored
    label: Label

    def write(self, folder: Path) -> int:
        """See `Labelled`."""
        file = self.stored.folder / self.label.file
        if self.stored.path.is_dir() or volume_ending(self.stored.file):
            return self._write_volume(folder, file)
        if self.label.ending != IMAGE or not self._names:
            return 0
        with self.service.reading():
            image = read_image(self.stored.path)
            masks = read_masks(file, self._names)
        return _add(folder, image, masks)

    def _write_volume(self, folder: Path, file: Path) -> int:
        named = self.service.scratch()
        try:
            make_folder(named)
            copy = named / f"label{self.label.ending}"
            write_whole(file.read_bytes(), copy)
            if self._names:  # beside the label map, where its names are looked for
                said = {"labels": [{"value": number, "name": name} for number, name in self._names.items()]}
                write_whole(json.dumps(said).encode(), named / "label.json")
            with self.service.reading():
                view = SliceView(read_volume(self.stored.path))
                masks = {name: mask for name, mask in masks_on(view.volume, copy).items() if not name.isdigit()}
            masks.pop("mask", None)  # a label map's only object, which nothing names
            voxels = {index: [view.voxels_of(mask, index) for mask in masks.values()] for index in range(view.count)}
            shown = spread([index for index, planes in voxels.items() if any(plane.any() for plane in planes)])
            for index in shown:
                planes = {name: view.read_mask(mask, index) for name, mask in masks.items()}
                shown_here = {name: plane for name, plane in planes.items() if plane.any()}
                _add(folder, view.image(index), shown_here, self.stored.id)
            return len(shown)
        finally:
            remove(named)

    @property
    def _names(self) -> dict[int | str, str]:
        """Of the values of the label map, as the client said them."""
        said = self.label.info.get("label_info")
        entries = [one for one in said if isinstance(one, dict)] if isinstance(said, list) else []
        named = {one.get("idx"): one.get("name") for one in entries}
        return {n: name for n, name in named.items() if isinstance(n, int) and isinstance(name, str) and name.strip()}


_Listed = TypeVar("_Listed")


def spread(listed: Sequence[_Listed]) -> list[_Listed]:
    """At most SLICES of them, evenly spread."""
    if len(listed) <= SLICES:
        return list(listed)
    return [listed[int((place + 0.5) * len(listed) / SLICES)] for place in range(SLICES)]


def _add_session(folder: Path, session: Session, *, accepted: bool, patient: str = "") -> int:
    """The masks of a session. One that nobody accepted says nothing of what is absent."""
    masks = {name: mask for name, mask in session.masks.items() if accepted or mask.any()}
    return _add(folder, session.image, masks, patient)


def _add(folder: Path, image: Image, masks: Masks, patient: str = "") -> int:
    """Add what has a name; whether anything had, as a number of images."""
    named = {name: mask for name, mask in masks.items() if name != UNNAMED}
    if named:
        add_to_data_set(folder, image, named, "", patient)
    return bool(named)
