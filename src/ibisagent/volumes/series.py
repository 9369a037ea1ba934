"""What DICOM series there are below a folder or in a study of a DICOMweb server, and what is wrong with each.

Headers are read series by series, so that memory does not grow with the number of series.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import ConfigError, DataError
from ibisagent.volumes import dicomweb
from ibisagent.volumes.folders import Images, files_by_series, images_of
from ibisagent.volumes.frames import arrange, frames_of
from ibisagent.volumes.headers import attribute, first_item, first_number, turning_damage_into_one_line

PLANES = ("sagittal", "coronal", "axial")
"""By the axis of the world that the slices are crossed by."""

OBLIQUE = 0.9  # the least cosine of a plane's normal with an axis of the world to be called after it
_B_VALUES = ((0x0019, 0x100C), (0x0043, 0x1039), (0x2001, 0x1003))  # private ones: Siemens, GE, Philips
_GE_B_OFFSET = 10**9
_CONDITION = re.compile(r"(<=|>=|<|>|=)\s*([\d.]+)\s*(slices?|mm|ms|b)\b")
_COMPARE = {"<=": np.less_equal, ">=": np.greater_equal, "<": np.less, ">": np.greater, "=": np.equal}


@dataclass(frozen=True, slots=True)
class Series:
    """One series. number: in the list, from 1.

    place: the folder of its files, or its address. study: by the study's UID. slices: of the stack that is read. size:
    (columns, rows) of a slice. spacing_mm: (column, row, slice). plane: axial, coronal, sagittal, oblique, or "" where
    it is not known. echo_times_ms, b_values: all that occur. problem: why it cannot be segmented, "" where it can.
    notes: what is passed over.
    """

    number: int
    uid: str
    study: str
    place: str
    modality: str
    series_number: str
    description: str
    files: tuple[Path, ...]
    slices: int = 0
    size: tuple[int, int] = (0, 0)
    spacing_mm: tuple[float, float, float] | None = None
    plane: str = ""
    echo_times_ms: tuple[float, ...] = ()
    b_values: tuple[float, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values; files are counted."""
        names = ("number", "uid", "study", "place", "modality", "series_number", "description", "slices", "plane")
        listed = {name: getattr(self, name) for name in names}
        lists = ("size", "spacing_mm", "echo_times_ms", "b_values", "notes")
        listed |= {name: None if getattr(self, name) is None else list(getattr(self, name)) for name in lists}
        return {**listed, "files": len(self.files), "problem": self.problem}


def list_series(place: str | Path) -> Iterator[Series]:
    """The series below a folder, or in the study that a DICOMweb address names, by their numbers.

    Raises DataError where there is none, ConfigError for an address that names no study.
    """
    if dicomweb.is_url(str(place)):
        found = dicomweb.series_metadata(str(place))
        yield from (
            describe(number, address, Images(headers, {}), tuple(headers))
            for number, (address, headers) in enumerate(found, start=1)
        )
        return
    folder = Path(place)
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; name one with DICOM series, or a study's DICOMweb address")
    groups = files_by_series(folder)
    if not groups:
        raise DataError(f"{folder}: holds no DICOM file; name a folder with DICOM series")
    for number, files in enumerate(groups, start=1):
        where = os.path.commonpath([file.parent for file in files])
        yield describe(number, where, images_of(files), tuple(files))


def describe(number: int, place: str, images: Images, files: tuple[Path, ...]) -> Series:
    """The series that `images` are, number `number` of a list; files: all of it, also what holds no image."""
    headers = list(images.headers.values())
    if not headers:
        return Series(number, "", "", place, "", "", "", files, problem="holds no image", notes=images.notes)
    first = headers[0]
    facts = {name: str(first.get(name, "") or "") for name in ("SeriesInstanceUID", "StudyInstanceUID", "Modality")}
    told = (str(first.get("SeriesNumber", "") or ""), str(first.get("SeriesDescription", "") or "").strip())
    known = (number, facts["SeriesInstanceUID"], facts["StudyInstanceUID"], place, facts["Modality"], *told, files)
    echoes = _values(headers, "MREchoSequence", "EffectiveEchoTime", "EchoTime")
    weights = _b_values(headers)
    size = int(first.Columns), int(first.Rows)
    try:
        with turning_damage_into_one_line(place):
            frames = [frame for file, header in images.headers.items() for frame in frames_of(file, header)]
        stack = arrange(frames, None, None, place)
    except DataError as error:
        problem = str(error).removeprefix(f"{place}: ")
        return Series(*known, len(headers), size, None, _plane(first), echoes, weights, problem, images.notes)
    affine = stack.affine[:3, :3]
    across, down, step = (float(side) for side in np.linalg.norm(affine, axis=0))
    spacing = (across, down, step) if stack.spacing_known else None
    size = stack.frames[0].size[1], stack.frames[0].size[0]
    plane = "" if stack.positions is None else _plane_of(np.cross(affine[:, 0], affine[:, 1]))
    notes = (*images.notes, *stack.notes)
    return Series(*known, len(stack.frames), size, spacing, plane, echoes, weights, "", notes)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which series of many are meant: see `parse_selection`. text: as it was given."""

    text: str
    words: tuple[str, ...] = ()
    described: tuple[str, ...] = ()
    bounds: tuple[tuple[str, float, str], ...] = ()

    def why_not(self, series: Series) -> str:
        """Why the series is passed over; "" where it is chosen."""
        if series.problem:
            return series.problem
        for word in self.words:
            if word not in (series.plane, series.modality.casefold()):
                return f"is {series.modality or 'of unknown modality'} {series.plane}".rstrip() + f", not {word}"
        for text in self.described:
            if text not in series.description.casefold():
                return f"its description does not say '{text}'"
        for sign, bound, unit in self.bounds:
            measured = {
                "slices": (float(series.slices),),
                "mm": (series.spacing_mm[2],) if series.spacing_mm else (),
                "ms": series.echo_times_ms,
                "b": series.b_values,
            }[unit]
            if not measured or not all(_COMPARE[sign](value, bound) for value in measured):
                said = ", ".join(f"{value:g}" for value in measured) or "no"
                return f"has {said} {unit}, not {sign} {bound:g}"
        return ""


def parse_selection(text: str) -> Selection:
    """A choice of series as text, all of which must hold: "CT axial >= 20 slices", "MR 't1' <= 3 mm", "all".

    Words are a modality as DICOM codes it or a plane; a text in quotes stands in the description; bounds are on
    `slices`, `mm` (between slices), `ms` (echo time) and `b` (diffusion weighting). "all" chooses every series that can
    be read. Raises ConfigError for anything else.
    """
    rest = text.strip().casefold()
    described = tuple(re.findall(r"['\"]([^'\"]+)['\"]", rest))
    rest = re.sub(r"['\"][^'\"]+['\"]", " ", rest)
    bounds = tuple(
        (sign, float(number), "slices" if unit.startswith("slice") else unit)
        for sign, number, unit in _CONDITION.findall(rest)
    )
    words = tuple(word for word in _CONDITION.sub(" ", rest).replace(",", " ").split() if word not in ("all", "and"))
    wrong = [word for word in words if word not in (*PLANES, "oblique") and not re.fullmatch(r"[a-z]{2,6}", word)]
    unsure = [word for word in words if word not in (*PLANES, "oblique") and len(word) > 2 and word != "other"]
    if wrong or unsure or not text.strip():
        raise ConfigError(
            f"selection '{text[:60]}': '{(wrong or unsure or [''])[0]}' is neither a modality (CT, MR, PT) nor a plane;"
            ' give all, or such as "CT axial >= 20 slices", "MR \'t1\' <= 3 mm"'
        )
    return Selection(text.strip(), words, described, bounds)


def _values(headers: Iterable[Any], group: str, name: str, plain: str) -> tuple[float, ...]:
    """All values of an attribute, of files or of their frames."""
    found = set[float]()
    for header in headers:
        shared = first_item(header, "SharedFunctionalGroupsSequence")
        for each in header.get("PerFrameFunctionalGroupsSequence") or [None]:
            groups = [item for item in (each, shared) if item is not None]
            value = attribute(header, groups, group, name)
            value = header.get(plain) if value in (None, "") else value
            if value not in (None, ""):
                found.add(round(first_number(value), 3))
    return tuple(sorted(found))


def _b_values(headers: list[Any]) -> tuple[float, ...]:
    found = _values(headers, "MRDiffusionSequence", "DiffusionBValue", "DiffusionBValue")
    if found:
        return found
    private = set[float]()
    for header in headers:
        for tag in _B_VALUES:
            if tag in header:
                value = header[tag].value
                number = first_number(value.decode("latin-1").split("\\")[0] if isinstance(value, bytes) else value)
                private.add(number % _GE_B_OFFSET if tag[0] == 0x0043 else number)
                break
    return tuple(sorted(private))


def _plane(header: Any) -> str:
    directions = header.get("ImageOrientationPatient")
    if directions is None or len(directions) != 6:
        return ""
    numbers = np.array([float(number) for number in directions])
    return _plane_of(np.cross(numbers[:3], numbers[3:]))


def _plane_of(normal: np.ndarray) -> str:
    length = float(np.linalg.norm(normal))
    cosines = np.abs(normal) / (length or 1.0)
    return PLANES[int(np.argmax(cosines))] if cosines.max() >= OBLIQUE else "oblique"
