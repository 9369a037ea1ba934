"""Which files of a folder are read: DICOM images, each instance once, of one series; what is passed over is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibisagent.errors import DataError
from ibisagent.files import one_line
from ibisagent.volumes.headers import check_image, first_number, is_no_image, may_be_dicom, numbers, read_header

_LONGEST_LIST = 400  # characters


@dataclass(frozen=True, slots=True)
class Images:
    """Headers of images by file, and the files that were passed over, by the reason why."""

    headers: Mapping[Path, Any]
    passed: Mapping[str, tuple[Path, ...]]

    @property
    def notes(self) -> tuple[str, ...]:
        """One line that says what was passed over; none where nothing was."""
        if not self.passed:
            return ()
        told = [
            f"{len(files)} {reason} ({files[0].name}{', ...' if len(files) > 1 else ''})"
            for reason, files in self.passed.items()
        ]
        return (f"passed over {', '.join(told)}",)


def images_below(folder: Path) -> Images:
    """The images below `folder`. DataError if there is none.

    Files that are not named or marked as DICOM, and DICOM objects that are no images, are no matter of a reader and are
    not told. Passed over and told are: what is named as DICOM and is none, what cannot be read, and an instance that
    was there already.
    """
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and may_be_dicom(file))
    images = images_of(files)
    if not images.headers:
        raise DataError(
            f"{folder}: holds no DICOM image; name an image file, or a folder with a DICOM series"
            + "".join(f" ({note})" for note in images.notes)
        )
    return images


def images_of(files: Iterable[Path]) -> Images:
    """The images among `files`; see `images_below`."""
    headers: dict[Path, Any] = {}
    passed: dict[str, list[Path]] = {}
    seen: set[tuple[Any, ...]] = set()
    for file in files:
        if file.name.startswith("._"):
            passed.setdefault("of macOS beside the images", []).append(file)
            continue
        if not file.stat().st_size:
            passed.setdefault("empty", []).append(file)
            continue
        try:
            header = read_header(file)
            if is_no_image(header):
                continue
            check_image(file, header)
        except DataError as error:
            reason = "not DICOM" if "is not DICOM" in str(error) else "unreadable"
            passed.setdefault(reason, []).append(file)
            continue
        instance = _instance(header)
        if instance is not None and instance in seen:
            passed.setdefault("there twice", []).append(file)
            continue
        if instance is not None:
            seen.add(instance)
        headers[file] = header
    return Images(headers, {reason: tuple(found) for reason, found in passed.items()})


def series_of(images: Images) -> list[tuple[str, Images]]:
    """(SeriesInstanceUID, its images) in the order of their numbers, as lists of them show it."""
    found: dict[str, dict[Path, Any]] = {}
    for file, header in images.headers.items():
        found.setdefault(str(header.get("SeriesInstanceUID", "")), {})[file] = header
    ordered = sorted(found, key=lambda uid: (first_number(next(iter(found[uid].values())).get("SeriesNumber")), uid))
    return [(uid, Images(found[uid], images.passed)) for uid in ordered]


def choose_series(folder: Path, images: Images, wanted: str | None) -> Images:
    """The images of the series `wanted`, by UID or number in the list; None: the only one, localizers aside.

    DataError that lists the series where that names none.
    """
    found = series_of(images)
    by_uid = dict(found)
    if wanted in by_uid:
        return by_uid[wanted]
    if wanted is not None and wanted.isdigit() and 1 <= int(wanted) <= len(found):
        return found[int(wanted) - 1][1]
    if wanted is None:
        others = [one for _, one in found if not all(_is_localizer(header) for header in one.headers.values())]
        if len(found) == 1:
            return found[0][1]
        if len(others) == 1:
            scouts = tuple(file for file, header in images.headers.items() if _is_localizer(header))
            return Images(others[0].headers, {**images.passed, "localizers": scouts})
    raise DataError(
        f"{folder}: holds {len(found)} series: {_listed(found)}; choose with --series, or more than one with --select;"
        " 'ibisagent data series' tells more of them"
    )


def _listed(found: Sequence[tuple[str, Images]]) -> str:
    """Number, modality, description and size of each series, as many as a line of an error holds."""
    shown: list[str] = []
    for number, (_, one) in enumerate(found, 1):
        first = next(iter(one.headers.values()))
        name = one_line(str(first.get("SeriesDescription", "") or ""), 24)
        told = [str(first.get("Modality", "") or "?"), *([name] if name else []), f"{len(one.headers)} files"]
        shown.append(f"{number} ({', '.join(told)})")
        if len(", ".join(shown)) > _LONGEST_LIST:
            return ", ".join(shown) + (", ..." if number < len(found) else "")
    return ", ".join(shown)


def files_by_series(folder: Path) -> list[list[Path]]:
    """The DICOM files below `folder`, a list for each series: images in the order of `series_of`, other objects last.

    Headers are not kept. What cannot be read is left out; the reader of a folder tells of it.
    """
    found: dict[str, list[Path]] = {}
    ranks: dict[str, tuple[bool, float, str]] = {}
    for file in sorted(folder.rglob("*")):
        if file.name.startswith("._") or not file.is_file() or not may_be_dicom(file):
            continue
        try:
            header = read_header(file)
        except DataError:
            continue
        uid = str(header.get("SeriesInstanceUID", ""))
        found.setdefault(uid, []).append(file)
        rank = is_no_image(header), first_number(header.get("SeriesNumber")), uid
        ranks[uid] = min(ranks.get(uid, rank), rank)
    return [found[uid] for uid in sorted(found, key=lambda uid: ranks[uid])]


def _instance(header: Any) -> tuple[Any, ...] | None:
    """What two files that hold the same instance agree in; None where it has no UID.

    Place and number count too, since some programs give all slices one UID when they remove names.
    """
    uid = str(header.get("SOPInstanceUID", "") or "")
    place = numbers(header.get("ImagePositionPatient"), 3)
    return (uid, str(header.get("InstanceNumber", "")), None if place is None else tuple(place)) if uid else None


def _is_localizer(header: Any) -> bool:
    kinds = header.get("ImageType") or ()
    return "LOCALIZER" in ([kinds] if isinstance(kinds, str) else list(kinds))
