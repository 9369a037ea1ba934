"""DICOM structure sets (RTSTRUCT): masks as contours for radiotherapy, and contours as masks; by pydicom.

rt-utils, the one library that writes them from masks, had its last release in January 2023, draws contours through the
centres of the outermost pixels (so that every object loses half a pixel on each side), and fills holes; plastimatch is
a program, not a library. So this is a writer of our own, on the exact polygons of `contours`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.config import disable_value_validation
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from ibisagent.errors import DataError
from ibisagent.files import write_whole
from ibisagent.volumes.contours import filled, polygons
from ibisagent.volumes.grid import LPS, Volume, release, scratch_mask
from ibisagent.volumes.headers import STRUCTURE_SET, makers, quiet, turning_damage_into_one_line
from ibisagent.volumes.sources import Source, dataset_of, describe_source
from ibisagent.volumes.terms import colours, term

SERIES_NUMBER = 902
OFF_SLICE = 0.1
"""Share of the slices' distance by which a contour may lie beside its slice."""

_COPIED = (
    "SpecificCharacterSet",
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription"),
    *("AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID"),
)
_PLANAR = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def write_rtstruct(masks: Mapping[str, np.ndarray], volume: Volume, path: Path, provenance: Mapping[str, str]) -> None:
    """Write (I, J, K) bool masks as one structure set, an ROI for each that has a voxel.

    Contours are CLOSED_PLANAR along the pixels' edges: separate parts are separate contours, a hole is joined to its
    part by a keyhole, so that readers that know neither XOR nor nesting get the same mask. Codes and colours are those
    of `terms`. Raises ConfigError where the source is not DICOM, DataError where no mask has a voxel or the source does
    not say how the patient lies.
    """
    shown = {name: mask for name, mask in masks.items() if mask.any()}
    if not shown:
        raise DataError(f"{path.name}: no mask has a voxel; nothing was written")
    source = _placed_source(volume, path)
    with turning_damage_into_one_line(path.name), quiet(), disable_value_validation():
        made = _empty_set(source, provenance)
        for number, (name, colour) in enumerate(colours(shown).items(), start=1):
            made.StructureSetROISequence.append(
                dataset_of(
                    ROINumber=number,
                    ReferencedFrameOfReferenceUID=made.FrameOfReferenceUID,
                    ROIName=name[:64],
                    ROIGenerationAlgorithm="AUTOMATIC",
                    ROIGenerationDescription=makers(provenance),
                )
            )
            made.ROIContourSequence.append(
                dataset_of(
                    ReferencedROINumber=number,
                    ROIDisplayColor=list(colour),
                    ContourSequence=list(_contours(shown[name], volume, source)),
                )
            )
            made.RTROIObservationsSequence.append(_observation(number, name))
        encoded = io.BytesIO()
        made.save_as(encoded)
    write_whole(encoded.getvalue(), path)


def check_rtstruct(volume: Volume, path: Path) -> tuple[str, ...]:
    """What of the source will be repaired in a structure set of `volume`, a line each. Raises as `write_rtstruct`."""
    return _placed_source(volume, path).notes


def read_rtstruct(path: Path, volume: Volume) -> dict[str, np.ndarray]:
    """The ROIs of a structure set by name, each (I, J, K) bool on the grid of `volume`: pixels whose centre is inside.

    A contour within another one is a hole, keyhole or not. ROIs without closed contours (points, lines) are left out.
    DataError if a contour lies beside the slices, no ROI has one, or the file is damaged.
    """
    import pydicom

    with quiet(), turning_damage_into_one_line(str(path)):
        dataset = pydicom.dcmread(path)
        names = {int(item.ROINumber): str(item.get("ROIName", "") or "") for item in dataset.StructureSetROISequence}
        found: dict[str, np.ndarray] = {}
        for item in dataset.get("ROIContourSequence") or []:
            number = int(item.ReferencedROINumber)
            outlines = list(_outlines(item.get("ContourSequence") or [], volume))
            if not outlines:
                continue
            name = names.get(number) or f"ROI {number}"
            mask = found.setdefault(name if name not in found else f"{name} ({number})", scratch_mask(volume.shape))
            for k, together in _by_slice(outlines, volume, f"{path}, '{name}'").items():
                mask[:, :, k] = filled(together, (volume.shape[1], volume.shape[0])).T
    if not found:
        raise DataError(f"{path}: holds no closed contour; give a structure set with contours")
    return found


def _placed_source(volume: Volume, path: Path) -> Source:
    source = describe_source(volume, path.name)
    if not source.placed or not volume.oriented:
        raise DataError(f"{path.name}: {volume.name} does not say how the patient lies; ask for --format png or rle")
    return source


def _empty_set(source: Source, provenance: Mapping[str, str]) -> Any:
    """A structure set of the source's patient and study, without an ROI."""
    patient = source.stand_in
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = STRUCTURE_SET, generate_uid()
    meta.TransferSyntaxUID = ImplicitVRLittleEndian  # explicit VR ends at 64 KB, a long contour does not
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = STRUCTURE_SET, meta.MediaStorageSOPInstanceUID
    for name in _COPIED:
        if name in patient:
            made[name] = patient[name]
    made.SeriesInstanceUID, made.PositionReferenceIndicator = generate_uid(), ""
    made.Modality, made.SeriesNumber, made.InstanceNumber = "RTSTRUCT", SERIES_NUMBER, 1
    made.SeriesDescription = "Contours by ibisagent, not for clinical use"
    made.Manufacturer = made.ManufacturerModelName = "ibisagent"
    made.SoftwareVersions, made.OperatorsName = provenance.get("ibisagent", "unknown")[:64], ""
    made.StructureSetLabel, made.ApprovalStatus = "IBISAGENT", "UNAPPROVED"
    now = datetime.now()
    made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.InstanceCreationDate, made.InstanceCreationTime = made.StructureSetDate, made.StructureSetTime
    series = dataset_of(SeriesInstanceUID=source.series_uid, ContourImageSequence=list(source.references))
    study = dataset_of(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",  # retired, and still demanded of this sequence
        ReferencedSOPInstanceUID=patient.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    reference = dataset_of(FrameOfReferenceUID=made.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    made.ReferencedFrameOfReferenceSequence = [reference]
    made.StructureSetROISequence, made.ROIContourSequence, made.RTROIObservationsSequence = [], [], []
    return made


def _contours(mask: np.ndarray, volume: Volume, source: Source) -> Iterator[Any]:
    """The items of a contour sequence, each on the slice where the source's lies, even or not."""
    if source.positions is None:
        return
    steps = (LPS @ volume.affine)[:3, :2]
    drawn = ((k, one) for k in range(volume.shape[2]) for one in polygons(mask[:, :, k].T))
    for number, (k, outline) in enumerate(drawn, start=1):
        points = outline @ steps.T + source.positions[k]
        file, frame = source.frames[k]
        image = source.references[file]
        at = dataset_of(
            ReferencedSOPClassUID=image.ReferencedSOPClassUID, ReferencedSOPInstanceUID=image.ReferencedSOPInstanceUID
        )
        if frame is not None:
            at.ReferencedFrameNumber = frame + 1
        yield dataset_of(
            ContourNumber=number,
            ContourGeometricType="CLOSED_PLANAR",
            ContourImageSequence=[at],
            NumberOfContourPoints=len(points),
            ContourData=[f"{value:.4f}" for value in points.ravel()],
        )
    release(mask)


def _observation(number: int, name: str) -> Any:
    """What an ROI is. Anatomy is an ORGAN; which finding is a target volume, a radiotherapist decides."""
    known = term(name)
    anatomy = known.known and known.category.meaning == "Anatomical Structure"
    item = dataset_of(
        ObservationNumber=number,
        ReferencedROINumber=number,
        RTROIInterpretedType="ORGAN" if anatomy else "",
        ROIInterpreter="",
    )
    if known.known:
        kind = known.kind
        code = dataset_of(CodeValue=kind.value, CodingSchemeDesignator=kind.scheme, CodeMeaning=kind.meaning)
        item.RTROIIdentificationCodeSequence = [code]
    return item


def _outlines(contours: Any, volume: Volume) -> Iterator[np.ndarray]:
    """The closed contours in voxels, each (N, 3)."""
    for item in contours:
        data = item.get("ContourData")
        if str(item.get("ContourGeometricType", "")) in _PLANAR and data is not None and len(data) >= 9:
            points = np.array([float(value) for value in data]).reshape(-1, 3)
            if not np.isfinite(points).all():
                raise ValueError("a contour has a point that is no number")
            yield volume.voxel_places(points @ LPS[:3, :3])


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
