"""What DICOM objects made of a series take from it: patient and study, instances, places. Irregular text is repaired.

Scanners and archives leave dates, sexes and character sets that the standard does not know. They only describe, and no
mask is withheld for them: such a value is repaired where its meaning is plain, else left blank, and that is told. What
identifies (UIDs, the patient's name and number) is taken over as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, config
from pydicom.uid import CTImageStorage, SecondaryCaptureImageStorage, generate_uid
from pydicom.valuerep import DSfloat, validate_value

from ibisagent.errors import ConfigError, DataError
from ibisagent.volumes.grid import LPS, DicomOrigin, Volume
from ibisagent.volumes.headers import first_number, quiet, read_header

_UTF8 = "ISO_IR 192"
_PLAIN_SETS = re.compile(r"ISO_IR \d+|GB18030|GBK")
_SEXES = ("M", "F", "O", "")
_IDENTITY = ("PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName")
_EMPTY_AT_LEAST = (*_IDENTITY, "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime")
"""Must be there, and may be empty (type 2)."""

_STUDY = (
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyDescription", "StudyID"),
    "AdmittingDiagnosesDescription",
)
_PATIENT_GROUPS = (0x0010, 0x0012)
_TEXT = ("PN", "LO", "SH", "ST", "LT", "UC", "UT")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The source of a DICOM object.

    stand_in: a dataset with patient, study and the first slice's grid, as the standard wants it, to make objects of.
    references: an item per file (SOP class and instance). evidence: what a report refers to. frames: file number and
    frame of every slice, frame None where a file holds one. positions: (K, 3), as `DicomOrigin` has them. heights:
    along the normal. preserved: whether a frame has the pixels of its source. notes: what was repaired, a line each.
    """

    stand_in: Any
    references: list[Any]
    evidence: list[Any]
    series_uid: str
    frames: tuple[tuple[int, int | None], ...]
    positions: np.ndarray | None
    heights: tuple[float, ...]
    preserved: bool
    notes: tuple[str, ...]

    @property
    def placed(self) -> bool:
        """Whether the source says where it lies."""
        return self.positions is not None

    def frame(self, k: int, segment: int, place: int) -> Any:
        """The functional groups of a frame of `segment` on slice k, the place-th that is stored."""
        number, index = self.frames[k]
        of = dataset_of(
            **{
                name: self.references[number].get(name)
                for name in ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID")
            },
            PurposeOfReferenceCodeSequence=[_code("121322", "Source Image for Image Processing Operation")],
            SpatialLocationsPreserved="YES" if self.preserved else "NO",
        )
        if index is not None:
            of.ReferencedFrameNumber = index + 1
        derived = dataset_of(SourceImageSequence=[of], DerivationCodeSequence=[_code("113076", "Segmentation")])
        groups = dataset_of(
            DerivationImageSequence=[derived],
            FrameContentSequence=[dataset_of(DimensionIndexValues=[segment, place] if self.placed else [segment])],
            SegmentIdentificationSequence=[dataset_of(ReferencedSegmentNumber=segment)],
        )
        if self.positions is not None:
            groups.PlanePositionSequence = [dataset_of(ImagePositionPatient=_decimals(self.positions[k]))]
        return groups


def describe_source(volume: Volume, where: str) -> Source:
    """The source of objects made of `volume`. ConfigError where that is not DICOM, DataError for what it must not lack.

    where: the file to be written, for messages.
    """
    origin = volume.origin
    if not isinstance(origin, DicomOrigin):
        raise ConfigError(f"{where}: needs a DICOM source, {volume.name} is none; write nifti, png or rle")
    if origin.positions is None and volume.shape[2] > 1:
        raise DataError(f"{where}: {volume.name} does not say where its frames lie; ask for --format png or rle")
    files = list(dict.fromkeys(file for file, _ in origin.frames))
    headers = [_head(file) for file in files]
    for header, file in zip(headers, files, strict=True):
        if missing := [name for name in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID") if not header.get(name)]:
            raise DataError(f"{where}: {file.name} has no {missing[0]} to refer to; ask for --format nifti")
    numbers = {file: number for number, file in enumerate(files)}
    many = [first_number(header.get("NumberOfFrames")) > 1 or "frames" in header for header in headers]
    with quiet(), config.disable_value_validation():
        stand_in, notes = _stand_in(headers[0], volume, origin)
    references = [
        dataset_of(
            ReferencedSOPClassUID=str(header["SOPClassUID"]), ReferencedSOPInstanceUID=str(header["SOPInstanceUID"])
        )
        for header in headers
    ]
    names = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID")
    evidence = [
        dataset_of(StudyInstanceUID=stand_in.StudyInstanceUID, **{name: str(header[name]) for name in names})
        for header in headers
    ]
    normal = np.cross(*(LPS[:3, :3] @ volume.affine[:3, axis] for axis in (0, 1)))
    positions = origin.positions
    heights = () if positions is None else tuple(float(x) for x in positions @ (normal / np.linalg.norm(normal)))
    return Source(
        stand_in,
        references,
        evidence,
        str(headers[0]["SeriesInstanceUID"]),
        tuple((numbers[file], index if many[numbers[file]] else None) for file, index in origin.frames),
        positions,
        heights,
        not origin.tiled,
        notes,
    )


def dataset_of(**attributes: Any) -> Any:
    """A dataset of these attributes."""
    made = Dataset()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def _head(file: Path) -> dict[str, Any]:
    """What objects need of a file's header, by name; the whole of it, and whether it describes frames, beside."""
    header = read_header(file)
    names = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "NumberOfFrames")
    kept = {name: header.get(name) for name in names}
    kept["header"] = header
    return kept | ({"frames": True} if header.get("PerFrameFunctionalGroupsSequence") else {})


def _stand_in(head: dict[str, Any], volume: Volume, origin: DicomOrigin) -> tuple[Any, tuple[str, ...]]:
    header = head["header"]
    made, repaired = _patient_and_study(header)
    notes = [f"DICOM objects get {', '.join(repaired)}"] if repaired else []
    made.SOPInstanceUID, made.SeriesInstanceUID = str(head["SOPInstanceUID"]), str(head["SeriesInstanceUID"])
    made.StudyInstanceUID = str(header.get("StudyInstanceUID") or generate_uid(entropy_srcs=[made.SeriesInstanceUID]))
    made.Modality = str(header.get("Modality") or "OT")
    made.Rows, made.Columns = volume.shape[1], volume.shape[0]
    made.SOPClassUID = SecondaryCaptureImageStorage if origin.positions is None else CTImageStorage
    for name in ("Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions"):
        if header.get(name):
            setattr(made, name, str(header.get(name)))
    if origin.positions is not None:
        frame = str(header.get("FrameOfReferenceUID") or "")
        if not frame:
            frame = generate_uid(entropy_srcs=[made.SeriesInstanceUID])
            notes.append("the source has no FrameOfReferenceUID: DICOM objects get one made of its series")
        made.FrameOfReferenceUID = frame
        made.PositionReferenceIndicator = str(header.get("PositionReferenceIndicator") or "")
        columns = LPS[:3, :3] @ volume.affine[:3, :3]
        across, down = (columns[:, axis] / np.linalg.norm(columns[:, axis]) for axis in (0, 1))
        made.ImageOrientationPatient = _decimals([*across, *down])
        made.ImagePositionPatient = _decimals(origin.positions[0])
    if volume.spacing_known:
        made.PixelSpacing = _decimals([volume.spacing_mm[1], volume.spacing_mm[0]])
    thickness = first_number(header.get("SliceThickness")) or volume.spacing_mm[2]
    made.SliceThickness = _decimals([thickness])[0]
    return made, tuple(notes)


def _patient_and_study(header: Any) -> tuple[Any, list[str]]:
    """The attributes of patient and study, fit to be written, and what was done to them."""
    made, repaired = Dataset(), list[str]()
    told = header.get("SpecificCharacterSet")
    if told is not None:
        plain = isinstance(told, str) and _PLAIN_SETS.fullmatch(told) is not None
        made.SpecificCharacterSet = told if plain else _UTF8
        if not plain:
            repaired.append("their text in UTF-8")
    for element in header:
        name = element.keyword
        if not name or (element.tag.group not in _PATIENT_GROUPS and name not in _STUDY) or element.VR == "SQ":
            continue
        value = element.value
        if element.VR in _TEXT:
            setattr(
                made,
                name,
                [str(part) for part in value]
                if hasattr(value, "__iter__") and not isinstance(value, str) and element.VR != "PN"
                else str(value or ""),
            )
            continue
        mended = _mended(element.VR, name, value)
        if mended != str(value or ""):
            repaired.append(f"{name} {mended}" if mended else f"no {name}")
        if mended or name in _EMPTY_AT_LEAST:
            setattr(made, name, mended)
    for name in _EMPTY_AT_LEAST:
        if name not in made:
            setattr(made, name, "")
    return made, repaired


def _mended(representation: str, name: str, value: Any) -> str:
    """A value as the standard writes it; "" where it cannot be known."""
    text = "" if value is None else str(value).strip(" \0")
    if representation == "DA" and (match := re.fullmatch(r"(\d{4})[.\-/](\d{2})[.\-/](\d{2})", text)):
        text = "".join(match.groups())
    if representation == "TM" and (match := re.fullmatch(r"(\d{2}):?(\d{2})?:?(\d{2})?(\.\d+)?", text)):
        text = "".join(part for part in match.groups()[:3] if part) + (match[4] or "")[:7]
    if name == "PatientSex":
        text = text[:1].upper() if text[:1].upper() in _SEXES else ""
    return text if _is_valid(representation, text) else ""


def _is_valid(representation: str, text: str) -> bool:
    import datetime

    if not text:
        return True
    try:
        validate_value(representation, text, config.RAISE)
        if representation == "DA":
            datetime.date(int(text[:4]), int(text[4:6]), int(text[6:8]))
        if representation == "TM":
            datetime.time(int(text[:2]), int(text[2:4] or 0), min(int(text[4:6] or 0), 59))
    except ValueError:
        return False
    return True


def _decimals(values: Any) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]


def _code(value: str, meaning: str) -> Any:
    return dataset_of(CodeValue=value, CodingSchemeDesignator="DCM", CodeMeaning=meaning)
