"""What an operator offers to be labelled: files, folders and data sets that are named at the start, by their paths.

No address takes a path. What is offered has an id, under which it is opened, as an upload would be, when somebody
first asks for it; until then it is only listed. The id is made of its place, so that the same offer finds the work of
yesterday.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ibisagent.datasets import IMAGE_SUFFIXES, CaseSource, layout_of, read_cases
from ibisagent.domain import Case, Image, Masks
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.images import read_image
from ibisagent.volumes import is_volume
from ibisagent.volumes.series import list_series

log = logging.getLogger(__name__)

MAX_OFFERS = 5000
Given = Literal["", "query", "masks"]
UNNAMED = "target"  # the request of an image about which nobody has asked anything yet


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One image or scan that may be opened.

    place: the folder that holds it. given: what of it comes from a data set, the request, or the masks to begin with as
    well. created: where it stands in the list, in seconds since 1970.
    """

    id: str
    name: str
    place: Path
    query: str = UNNAMED
    given: Given = ""
    created: float = 0.0

    def without_paths(self, error: DataError) -> DataError:
        """The same error, which says nothing of where the file lies."""
        text = str(error).replace(f"{self.place}/", "").replace(str(self.place), self.name)
        return type(error)(text)


@dataclass(frozen=True, kw_only=True)
class OfferedImage(Offer):
    """An image. read: gives it, and the masks that its session begins with by target."""

    read: Callable[[], tuple[Image, Masks]]
    kind: Literal["image"] = "image"

    def image(self) -> tuple[Image, Masks]:
        """What `read` gives. DataError where it cannot be used."""
        try:
            image, masks = self.read()
        except DataError as error:
            raise self.without_paths(error) from error
        return replace(image, source=self.name), masks


@dataclass(frozen=True, kw_only=True)
class OfferedScan(Offer):
    """A scan. files: more than one for a DICOM series."""

    files: tuple[Path, ...]
    kind: Literal["scan"] = "scan"

    def contents(self) -> list[tuple[str, bytes]]:
        """Its files as an upload has them. DataError where they are not there any more."""
        try:
            (name, first), *rest = [(file.name, file.read_bytes()) for file in self.files]
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read any more ({error.strerror}); is it still there?") from error
        return [(self.name if rest else name, first), *rest]


def offers_of(
    places: Sequence[Path], *, split: str | None = None, ground_truth: bool = False
) -> dict[str, OfferedImage | OfferedScan]:
    """What is at these places, by id, in their order: images and scans, of folders all below them, and data sets
    (`read_cases`), of which every row is an image with its request.

    split: of data sets, as for `read_cases`. ground_truth: begin with the masks of the data set, to correct them.
    Raises DataError where there is nothing to be labelled, ConfigError for more than MAX_OFFERS.
    """
    found = {offer.id: offer for place in places for offer in _at(place.absolute(), split, ground_truth)}
    if len(found) > MAX_OFFERS:
        raise ConfigError(
            f"{len(found)} images are too many for one list, at most {MAX_OFFERS}: name a part of them, or give --split"
        )
    began = time.time()
    return {id_: replace(one, created=began + number * 1e-6) for number, (id_, one) in enumerate(found.items())}


def _at(place: Path, split: str | None, ground_truth: bool) -> Iterator[OfferedImage | OfferedScan]:
    if not place.exists():
        raise DataError(f"{place}: no such file or folder; name images, a folder of them, or a data set")
    if _is_data_set(place):
        return _rows(place, read_cases(place, split=split), ground_truth)
    if split is not None or ground_truth:
        raise ConfigError(f"{place}: --split and --ground-truth are for data sets, and this is none")
    if place.is_dir():
        return _below(place)
    return iter([_image(place.parent, place) if place.suffix.lower() in IMAGE_SUFFIXES else _scan(place.parent, place)])


def _is_data_set(place: Path) -> bool:
    if place.is_file():
        return place.suffix.lower() in (".csv", ".jsonl", ".json", ".npz")
    try:
        layout_of(place)
    except DataError:  # a folder of images or scans
        return False
    return True


def _rows(place: Path, cases: CaseSource, ground_truth: bool) -> Iterator[OfferedImage | OfferedScan]:
    root = place if place.is_dir() else place.parent

    def reading(index: int) -> Callable[[], tuple[Image, Masks]]:
        def read() -> tuple[Image, Masks]:
            case: Case = cases[index]
            masks = (case.targets or {}) if ground_truth else {}
            return case.image, {name: mask for name, mask in masks.items() if mask.any()}

        return read

    given: Given = "masks" if ground_truth else "query"
    for index, row in enumerate(cases.rows):
        id_ = _id(root, row.id, given)
        yield OfferedImage(id=id_, name=row.image.name, place=root, query=row.query, given=given, read=reading(index))


def _below(folder: Path) -> Iterator[OfferedImage | OfferedScan]:
    files = sorted((file for file in folder.rglob("*") if _is_open(file, folder)), key=_in_order)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    series = _series(folder)
    of_series = {file for one in series for file in one.files}
    others = (file for file in files if file not in of_series and file.suffix.lower() not in IMAGE_SUFFIXES)
    scans = [file for file in others if is_volume(file)]
    if not images and not scans and not series:
        raise DataError(f"{folder}: holds no image and no scan; name a folder that does, or a data set")
    yield from (_image(folder, file) for file in images)
    yield from (_scan(folder, file) for file in scans)
    yield from series


def _series(folder: Path) -> list[OfferedScan]:
    found = []
    try:
        for one in list_series(folder):
            name = one.description or Path(one.place).name
            if one.problem:
                log.warning("left out: %s, %s", name, one.problem)
            else:
                id_ = _id(folder, one.uid or one.place)
                found.append(OfferedScan(id=id_, name=name, place=folder, files=one.files))
    except DataError:  # there is no DICOM
        return []
    return found


def _image(folder: Path, file: Path) -> OfferedImage:
    id_ = _id(folder, str(file.relative_to(folder)))
    return OfferedImage(id=id_, name=file.name, place=folder, read=lambda: (read_image(file), {}))


def _scan(folder: Path, file: Path) -> OfferedScan:
    return OfferedScan(id=_id(folder, str(file.relative_to(folder))), name=file.name, place=folder, files=(file,))


def _id(folder: Path, inside: str, variant: str = "") -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, "\0".join((folder.as_uri(), inside, variant))).hex


def _is_open(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _in_order(file: Path) -> list[tuple[int, str]]:
    """So that image-9 stands before image-10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(file).casefold())]
