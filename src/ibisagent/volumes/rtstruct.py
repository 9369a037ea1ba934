"""DICOM structure sets (RTSTRUCT): masks as contours for radiotherapy, and contours as masks; by pydicom.

rt-utils, the one library that writes them from masks, had its last release in January 2023, draws contours through the
centres of the outermost pixels (so that every object loses half a pixel on each side), and fills holes; plastimatch is
a program, not a library. So this is a writer of our own, on the exact polygons of `contours`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import ConfigError, DataError
from ibisagent.files import write_whole
from ibisagent.volumes.contours import filled, polygons
from ibisagent.volumes.dicom import attribute, first_item, numbers, quiet, read_header, turning_damage_into_one_line
from ibisagent.volumes.grid import LPS, DicomOrigin, Volume, scratch
from ibisagent.volumes.terms import Code, colours, term

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
SERIES_NUMBER = 902
OFF_SLICE = 0.1
"""Share of the slices' distance by which a contour may lie beside its slice."""

_PLANAR = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_PATIENT = {
    "PatientName": ".*",
    "PatientID": ".*",
    "PatientBirthDate": r"\d{8}",
    "PatientSex": "[MFO]",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2,6}(\.\d{1,6})?",
    "StudyID": ".*",
    "StudyDescription": ".*",
    "AccessionNumber": ".*",
    "ReferringPhysicianName": ".*",
}
"""What is taken over from the source, and how it must look: it may be empty, and is where the source's is irregular."""


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """One slice of the source: its image (class and instance), its frame from 1 (None: the image has one), its place.

    place: (4, 4), from (column, row, 0, 1) to DICOM's world.
    """

    image: tuple[str, str]
    frame: int | None
    place: np.ndarray


def write_rtstruct(masks: Mapping[str, np.ndarray], volume: Volume, path: Path, made_by: Mapping[str, str]) -> None:
    """Write (I, J, K) bool masks as one structure set, an ROI for each that has a voxel.

    Contours are CLOSED_PLANAR along the pixels' edges: separate parts are separate contours, a hole is joined to its
    part by a keyhole, so that readers that know neither XOR nor nesting get the same mask. Codes and colours are those
    of `terms`. Raises ConfigError where the source is not DICOM, DataError where no mask has a voxel or the source does
    not say how the patient lies.
    """
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian, generate_uid

    if not isinstance(volume.origin, DicomOrigin):
        raise ConfigError(f"{path.name}: needs a DICOM source, {volume.name} is none; write nifti, png or rle")
    if not volume.oriented:
        raise DataError(f"{path.name}: {volume.name} does not say how the patient lies; write png or rle")
    shown = {name: mask for name, mask in masks.items() if mask.any()}
    if not shown:
        raise DataError(f"{path.name}: no mask has a voxel; nothing was written")
    source = volume.origin.frames[0][0]
    with turning_damage_into_one_line(str(source)):
        slices, first = list(_slices(volume.origin)), read_header(source)
    with turning_damage_into_one_line(str(source)), quiet():
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = STRUCTURE_SET, generate_uid()
        meta.TransferSyntaxUID = ImplicitVRLittleEndian  # explicit VR ends at 64 KB, a long contour does not
        made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        made.SpecificCharacterSet = "ISO_IR 192"
        made.SOPClassUID, made.SOPInstanceUID = STRUCTURE_SET, meta.MediaStorageSOPInstanceUID
        for name, looks in _PATIENT.items():
            said = str(first.get(name, "") or "")
            setattr(made, name, said if re.fullmatch(looks, said) else "")
        made.StudyInstanceUID, made.SeriesInstanceUID = first.StudyInstanceUID, generate_uid()
        reference = str(first.get("FrameOfReferenceUID", "") or "")
        reference = reference or generate_uid(entropy_srcs=[str(first.SeriesInstanceUID)])
        made.FrameOfReferenceUID, made.PositionReferenceIndicator = reference, ""
        made.Modality, made.SeriesNumber, made.InstanceNumber = "RTSTRUCT", SERIES_NUMBER, 1
        made.SeriesDescription = "Contours by ibisagent, not for clinical use"
        made.Manufacturer = made.ManufacturerModelName = "ibisagent"
        made.SoftwareVersions, made.OperatorsName = made_by.get("ibisagent", "unknown")[:64], ""
        made.StructureSetLabel, made.ApprovalStatus = "IBISAGENT", "UNAPPROVED"
        now = datetime.now()
        made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
        made.InstanceCreationDate, made.InstanceCreationTime = made.StructureSetDate, made.StructureSetTime
        made.ReferencedFrameOfReferenceSequence = [_reference(first, slices, reference)]
        made.StructureSetROISequence, made.ROIContourSequence, made.RTROIObservationsSequence = [], [], []
        for number, (name, colour) in enumerate(colours(shown).items(), start=1):
            region = Dataset()
            region.ROINumber, region.ReferencedFrameOfReferenceUID = number, reference
            region.ROIName, region.ROIGenerationAlgorithm = name[:64], "AUTOMATIC"
            region.ROIGenerationDescription = _makers(made_by)
            made.StructureSetROISequence.append(region)
            drawn = Dataset()
            drawn.ReferencedROINumber, drawn.ROIDisplayColor = number, list(colour)
            drawn.ContourSequence = list(_contours(shown[name], slices))
            made.ROIContourSequence.append(drawn)
            made.RTROIObservationsSequence.append(_observation(number, name))
        encoded = io.BytesIO()
        made.save_as(encoded)
    write_whole(encoded.getvalue(), path)


def is_rtstruct(path: Path) -> bool:
    """Whether the file is a DICOM structure set."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return False
    return str(read_header(path).get("SOPClassUID", "")) == STRUCTURE_SET


def read_rtstruct(path: Path, volume: Volume) -> dict[str, np.ndarray]:
    """The ROIs of a structure set by name, each (I, J, K) bool on the grid of `volume`: pixels whose centre is inside.

    A contour within another one is a hole, keyhole or not. ROIs without closed contours (points, lines) are left out.
    DataError if a contour lies beside the slices, no ROI has one, or the file is damaged.
    """
    import pydicom

    with quiet(), turning_damage_into_one_line(str(path)):
        dataset = pydicom.dcmread(path)
        names = {int(item.ROINumber): str(item.get("ROIName", "") or "") for item in dataset.StructureSetROISequence}
        to_voxels = np.linalg.inv(volume.affine) @ LPS
        found: dict[str, np.ndarray] = {}
        for item in dataset.get("ROIContourSequence") or []:
            number = int(item.ReferencedROINumber)
            outlines = list(_outlines(item.get("ContourSequence") or [], to_voxels))
            if not outlines:
                continue
            name = names.get(number) or f"ROI {number}"
            mask = found.setdefault(name if name not in found else f"{name} ({number})", scratch(volume.shape, bool))
            for k, together in _by_slice(outlines, volume, f"{path}, '{name}'").items():
                mask[:, :, k] = filled(together, (volume.shape[1], volume.shape[0])).T
    if not found:
        raise DataError(f"{path}: holds no closed contour; give a structure set with contours")
    return found


def _slices(origin: DicomOrigin) -> Iterator[_Slice]:
    """The slices in the order of k; of the files' headers one is in memory at a time."""
    for file, together in groupby(origin.frames, key=lambda frame: frame[0]):
        header = read_header(file)
        shared = first_item(header, "SharedFunctionalGroupsSequence")
        each = header.get("PerFrameFunctionalGroupsSequence") or []
        count = int(header.get("NumberOfFrames", 1) or 1)
        image = str(header.SOPClassUID), str(header.SOPInstanceUID)
        for _, index in together:
            groups = [group for group in (each[index] if each else None, shared) if group is not None]
            yield _Slice(image, index + 1 if count > 1 else None, _place(header, groups, file))


def _place(header: Any, groups: list[Any], file: Path) -> np.ndarray:
    """See `_Slice`."""
    orientation = numbers(attribute(header, groups, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    position = numbers(attribute(header, groups, "PlanePositionSequence", "ImagePositionPatient"), 3)
    spacing = numbers(attribute(header, groups, "PixelMeasuresSequence", "PixelSpacing"), 2)
    if orientation is None or position is None or spacing is None:
        raise DataError(f"{file}: does not say where its frames lie, so no contour can be placed; write png or rle")
    place = np.eye(4)
    place[:3, 0], place[:3, 1], place[:3, 3] = orientation[:3] * spacing[1], orientation[3:] * spacing[0], position
    return place


def _contours(mask: np.ndarray, slices: list[_Slice]) -> Iterator[Any]:
    """The items of a contour sequence."""
    from pydicom.dataset import Dataset

    number = 0
    for k, one in enumerate(slices):
        for outline in polygons(mask[:, :, k].T) if mask[:, :, k].any() else []:
            number += 1
            flat = np.column_stack([outline, np.zeros(len(outline)), np.ones(len(outline))])
            points = (flat @ one.place.T)[:, :3]
            item = Dataset()
            item.ContourNumber, item.ContourGeometricType = number, "CLOSED_PLANAR"
            item.ContourImageSequence = [_image(one)]
            item.NumberOfContourPoints = len(points)
            item.ContourData = [f"{value:.4f}" for value in points.ravel()]
            yield item


def _image(one: _Slice) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = one.image
    if one.frame is not None:
        item.ReferencedFrameNumber = one.frame
    return item


def _reference(first: Any, slices: list[_Slice], frame_of_reference: str) -> Any:
    """Which images the contours lie in."""
    from pydicom.dataset import Dataset

    series, study, reference = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    images = {one.image[1]: _Slice(one.image, None, one.place) for one in slices}
    series.ContourImageSequence = [_image(one) for one in images.values()]
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # retired, and still demanded of this sequence
    study.ReferencedSOPInstanceUID = first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    reference.FrameOfReferenceUID = frame_of_reference
    reference.RTReferencedStudySequence = [study]
    return reference


def _observation(number: int, name: str) -> Any:
    """What an ROI is. Anatomy is an ORGAN; which finding is a target volume, a radiotherapist decides."""
    from pydicom.dataset import Dataset

    known = term(name)
    item = Dataset()
    item.ObservationNumber = item.ReferencedROINumber = number
    item.RTROIInterpretedType = "ORGAN" if known.category.meaning == "Anatomical Structure" else ""
    item.ROIInterpreter = ""
    if known.known:
        item.RTROIIdentificationCodeSequence = [_concept(known.kind)]
    return item


def _concept(code: Code) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme, code.meaning
    return item


def _makers(made_by: Mapping[str, str]) -> str:
    """Policy and segmenter, without the folders that a path may hold."""
    parts = [made_by.get(part, "").rsplit("/", 1)[-1] for part in ("policy", "segmenter")]
    return (" with ".join(part for part in parts if part) or "ibisagent").replace("\\", "/")[:64]


def _outlines(contours: Any, to_voxels: np.ndarray) -> Iterator[np.ndarray]:
    """The closed contours in voxels, each (N, 3)."""
    for item in contours:
        data = item.get("ContourData")
        if str(item.get("ContourGeometricType", "")) in _PLANAR and data is not None and len(data) >= 9:
            points = np.array([float(value) for value in data]).reshape(-1, 3)
            if not np.isfinite(points).all():
                raise ValueError("a contour has a point that is no number")
            yield points @ to_voxels[:3, :3].T + to_voxels[:3, 3]


def _by_slice(outlines: list[np.ndarray], volume: Volume, where: str) -> dict[int, list[np.ndarray]]:
    """Contours in (column, row) by slice k."""
    together: dict[int, list[np.ndarray]] = {}
    for points in outlines:
        k = round(float(points[:, 2].mean()))
        if not 0 <= k < volume.shape[2] or np.abs(points[:, 2] - k).max() > OFF_SLICE:
            raise DataError(
                f"{where}: a contour lies beside the slices of {volume.name}; give the structure set of this series"
            )
        together.setdefault(k, []).append(points[:, :2])
    return together
