"""Masks and measurements as DICOM objects, by highdicom: segmentations (SEG) and structured reports (TID 1500).

They carry patient and study as the source does, as DICOM demands: a de-identified source gives de-identified objects.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import ConfigError, DataError
from ibisagent.files import one_line, write_whole
from ibisagent.volumes.dicom import quiet, read_header
from ibisagent.volumes.grid import DicomOrigin, Volume
from ibisagent.volumes.measures import Measures

MANUFACTURER = "ibisagent"
SERIES_NUMBER = 900
"""Of the first series that is written; reports have the next one."""

_DISEASED = {"tumor": "Neoplasm", "tumour": "Neoplasm", "cancer": "Neoplasm", "polyp": "Lesion", "stroke": "Infarct"}
_SIDES = ("left ", "right ")


def write_segmentation(masks: Mapping[str, np.ndarray], volume: Volume, path: Path, made_by: Mapping[str, str]) -> Any:
    """Write (I, J, K) bool masks as one binary SEG file with a segment per target, and return its dataset.

    Only slices that show a target are stored. Every frame refers to the source's instance; the segments name policy and
    segmenter (`made_by`) as their algorithm. Targets that DICOM's segmentation property types know carry that code.
    Raises ConfigError without highdicom or where the source is not DICOM, DataError where no mask has a voxel or the
    source lacks what DICOM demands.
    """
    hd = _highdicom(path)
    headers, frames = _sources(volume, path)
    shown = {name: mask for name, mask in masks.items() if mask.any()}
    if not shown:
        raise DataError(f"{path}: no mask has a voxel, and DICOM has no empty segmentation; nothing was written")
    count = int(headers[0].get("NumberOfFrames", 1) or 1)
    several = len(headers) > 1 or count == 1
    planes = len(frames) if several else count
    stacked = np.zeros((planes, volume.shape[1], volume.shape[0], len(shown)), np.uint8)
    for k, (_, index) in enumerate(frames):
        for number, mask in enumerate(shown.values()):
            stacked[k if several else index, :, :, number] = mask[:, :, k].T
    with quiet(), _refusals(path, "SEG"):
        dataset = hd.seg.Segmentation(
            source_images=headers,
            pixel_array=stacked,
            segmentation_type="BINARY",
            segment_descriptions=[
                _description(hd, number, name, made_by) for number, name in enumerate(shown, start=1)
            ],
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name="ibisagent",
            software_versions=_short(made_by.get("ibisagent", "unknown")),
            device_serial_number="1",
            content_label="IBISAGENT",
            series_description="Masks by ibisagent, not for clinical use",
        )
        _complete(dataset, headers[0])
        _save(dataset, path)
    return dataset


def write_report(
    measured: Mapping[str, Measures], segmentation: Any, volume: Volume, path: Path, made_by: Mapping[str, str]
) -> None:
    """Write measurements as a Comprehensive 3D SR after TID 1500, one group per segment of the given SEG dataset.

    Raises ConfigError without highdicom, DataError where the source lacks what DICOM demands.
    """
    hd = _highdicom(path)
    from pydicom.sr.codedict import codes

    headers, _ = _sources(volume, path)
    groups = []
    for number, item in enumerate(segmentation.SegmentSequence, start=1):
        values = measured[str(item.SegmentDescription)]
        found = (
            (codes.SCT.Volume, values.volume_ml, hd.sr.CodedConcept("ml", "UCUM", "milliliter")),
            (codes.SCT.Area, values.area_mm2, codes.UCUM.SquareMillimeter),
            (codes.SCT.LongAxis, values.longest_diameter_mm, codes.UCUM.Millimeter),
        )
        category, kind = item.SegmentedPropertyCategoryCodeSequence[0], item.SegmentedPropertyTypeCodeSequence[0]
        groups.append(
            hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=hd.sr.TrackingIdentifier(uid=hd.UID(), identifier=str(item.SegmentLabel)),
                referenced_segment=hd.sr.ReferencedSegment(
                    sop_class_uid=segmentation.SOPClassUID,
                    sop_instance_uid=segmentation.SOPInstanceUID,
                    segment_number=number,
                    source_series=hd.sr.SourceSeriesForSegmentation(headers[0].SeriesInstanceUID),
                ),
                finding_category=hd.sr.CodedConcept(
                    category.CodeValue, category.CodingSchemeDesignator, category.CodeMeaning
                ),
                finding_type=hd.sr.CodedConcept(kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning),
                algorithm_id=hd.sr.AlgorithmIdentification(_algorithm(made_by), _short(made_by.get("ibisagent", "?"))),
                measurements=[
                    hd.sr.Measurement(name=name, value=round(float(value), 4), unit=unit)
                    for name, value, unit in found
                    if value is not None
                ],
            )
        )
    with quiet(), _refusals(path, "SR"):
        observer = hd.sr.ObserverContext(
            observer_type=codes.DCM.Device,
            observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
                uid=hd.UID(), name="ibisagent", manufacturer_name=MANUFACTURER
            ),
        )
        content = hd.sr.MeasurementReport(
            observation_context=hd.sr.ObservationContext(observer_device_context=observer),
            procedure_reported=hd.sr.CodedConcept("363679005", "SCT", "Imaging procedure"),
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )
        report = hd.sr.Comprehensive3DSR(
            evidence=[*headers, segmentation],
            content=content,
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBER + 1,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            series_description="Measurements by ibisagent, not for clinical use",
        )
        _complete(report, headers[0])
        _save(report, path)


def coded(name: str) -> tuple[Any, Any, bool]:
    """(category, type, whether the type is known) of a target for DICOM, looked up in its context group 7151.

    Sides are dropped, an unknown name is "Tissue"; the segment's label keeps the name in full.
    """
    from pydicom.sr.codedict import codes

    plain = " ".join(name.casefold().replace("_", " ").split())
    for side in _SIDES:
        plain = plain.removeprefix(side)
    last = plain.split()[-1] if plain else ""
    spelled = "".join(word.capitalize() for word in plain.split())
    names = [spelled, spelled.removesuffix("s"), _DISEASED.get(last, ""), last.capitalize() if last == "lesion" else ""]
    for known in filter(str.isidentifier, names):
        for group, category in (
            (codes.cid7159, codes.cid7150.MorphologicallyAbnormalStructure),
            (codes.cid7166, codes.cid7150.Tissue),
            (codes.cid7151, codes.cid7150.AnatomicalStructure),
        ):
            if known in group.dir():
                return category, getattr(group, known), True
    return codes.cid7150.Tissue, codes.cid7165.Tissue, False


def _description(hd: Any, number: int, name: str, made_by: Mapping[str, str]) -> Any:
    from pydicom.sr.codedict import codes

    category, kind, _ = coded(name)
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=_algorithm(made_by),
            family=codes.cid7162.ArtificialIntelligence,
            version=_short(made_by.get("ibisagent", "unknown")),
        ),
        tracking_uid=hd.UID(),
        tracking_id=name[:64],
    )
    description.SegmentDescription = name[:1024]
    return description


def _algorithm(made_by: Mapping[str, str]) -> str:
    """Policy and segmenter, without the folders that a path may hold."""
    parts = [made_by.get(part, "").rsplit("/", 1)[-1] for part in ("policy", "segmenter")]
    return _short(" with ".join(part for part in parts if part) or "ibisagent")


def _short(text: str) -> str:
    """As DICOM's long strings are: 64 characters, no backslash."""
    return text.replace("\\", "/")[:64]


def _highdicom(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import highdicom
    except ImportError as error:
        raise ConfigError(f"{path.name}: needs highdicom: pip install 'ibisagent[medical]'") from error
    return highdicom


def _sources(volume: Volume, path: Path) -> tuple[list[Any], tuple[tuple[Path, int], ...]]:
    """The headers of the source's files in the order of the slices, and file and frame of every slice."""
    if not isinstance(volume.origin, DicomOrigin):
        raise ConfigError(f"{path.name}: needs a DICOM source, {volume.name} is none; write nifti, png or rle")
    frames = volume.origin.frames
    files = list(dict.fromkeys(file for file, _ in frames))
    headers = [read_header(file) for file in files]
    if len(files) > 1 and len(files) != len(frames):
        raise DataError(f"{path.name}: {volume.name} is spread over several multi-frame files; give one of them")
    for header in headers:
        for name in (
            "PatientID",
            "PatientName",
            "PatientBirthDate",
            "PatientSex",
            "StudyID",
            "StudyDate",
            "StudyTime",
            "AccessionNumber",
            "ReferringPhysicianName",
        ):  # must be there, may be empty
            if name not in header:
                setattr(header, name, "")
    return headers, frames


def _complete(dataset: Any, source: Any) -> None:
    """What the modules of patient and study demand and highdicom leaves out where the source has it not."""
    if "PositionReferenceIndicator" not in dataset and "FrameOfReferenceUID" in dataset:
        dataset.PositionReferenceIndicator = source.get("PositionReferenceIndicator", "") or ""


def _save(dataset: Any, path: Path) -> None:
    encoded = io.BytesIO()
    dataset.save_as(encoded)
    write_whole(encoded.getvalue(), path)


class _refusals:  # noqa: N801 - reads as what it is where it is used
    """highdicom's refusals become one DataError."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, AttributeError | ValueError | TypeError | KeyError) and not isinstance(error, DataError):
            reason = one_line(error, 160)
            raise DataError(
                f"{self._path.name}: DICOM {self._kind} cannot be made of this source ({reason})"
            ) from error
