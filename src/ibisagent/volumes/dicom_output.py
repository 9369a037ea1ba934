"""Masks and measurements as DICOM objects, by highdicom: segmentations (SEG) and structured reports (TID 1500).

They carry patient and study as the source does, as DICOM demands: a de-identified source gives de-identified objects.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydicom.config import disable_value_validation
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DSfloat

from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.files import appearing_whole
from ibisagent.volumes.grid import Volume, release
from ibisagent.volumes.headers import long_string, makers, quiet, told
from ibisagent.volumes.measures import Measures
from ibisagent.volumes.sources import Source, dataset_of, describe_source
from ibisagent.volumes.terms import Code, Rgb, colours, term

MANUFACTURER = "ibisagent"
SERIES_NUMBER = 900
"""Of the first series that is written; reports have the next one."""


def write_segmentation(
    masks: Mapping[str, np.ndarray], volume: Volume, path: Path, provenance: Mapping[str, str]
) -> Any:
    """Write (I, J, K) bool masks as one binary SEG file with a segment per target, and return its header.

    Only slices that show a target are stored, each where the source's slice lies, even or not. Every frame refers to
    the source's instance; the segments name policy and segmenter (`provenance`) as their algorithm, and carry the codes
    and colours of `terms`. One slice is in memory at a time. Raises ConfigError without highdicom or where the source
    is not DICOM, DataError where no mask has a voxel or the source lacks what DICOM demands.
    """
    shown = {name: mask for name, mask in masks.items() if mask.any()}
    if not shown:
        raise DataError(f"{path}: no mask has a voxel, and DICOM has no empty segmentation; nothing was written")
    source = describe_source(volume, path.name)
    with _refusals(path, "SEG"), tempfile.TemporaryFile(prefix="ibisagent-") as pixels:
        dataset = _empty_segmentation(source, volume, shown, provenance, path)
        _put_frames(dataset, shown, volume, source, pixels)
        _save(dataset, path)
    del dataset.PixelData
    return dataset


def check_source(volume: Volume, path: Path, provenance: Mapping[str, str]) -> tuple[str, ...]:
    """Rehearse SEG and SR of `volume` before there is a mask; what will be left out or repaired, a line each.

    Raises as `write_segmentation` does, so that nobody waits for what cannot be written.
    """
    source = describe_source(volume, path.name)
    voxel = np.zeros((*volume.shape[:2], 1), bool)
    voxel[0, 0, 0] = True
    with _refusals(path, "SEG"), io.BytesIO() as pixels:
        dataset = _empty_segmentation(source, volume, {"rehearsal": voxel}, provenance, path)
        _put_frames(dataset, {"rehearsal": voxel}, volume, source, pixels)
        with quiet(), disable_value_validation():
            dataset.save_as(io.BytesIO())
    nothing = Measures(1, None, None, None, None, None, (0, 0))
    with _refusals(path, "SR"), quiet(), disable_value_validation():
        _report({"rehearsal": nothing}, dataset, source, provenance, path).save_as(io.BytesIO())
    return source.notes


def _empty_segmentation(
    source: Source, volume: Volume, shown: Mapping[str, np.ndarray], provenance: Mapping[str, str], path: Path
) -> Any:
    """A SEG dataset with everything but its frames; highdicom makes it of the first slice alone."""
    hd = _highdicom(path)
    columns, rows, _ = volume.shape
    one = np.zeros((1, rows, columns), np.uint8)
    one[0, 0, 0] = 1
    with quiet(), disable_value_validation():
        made = hd.seg.Segmentation(
            source_images=[source.stand_in],
            pixel_array=one,
            segmentation_type="BINARY",
            segment_descriptions=[
                _description(hd, number, name, colour, provenance)
                for number, (name, colour) in enumerate(colours(shown).items(), start=1)
            ],
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name="ibisagent",
            software_versions=long_string(provenance.get("ibisagent", "unknown")),
            device_serial_number="1",
            content_label="IBISAGENT",
            series_description="Masks by ibisagent, not for clinical use",
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
    if "PositionReferenceIndicator" not in made and "FrameOfReferenceUID" in made:
        made.PositionReferenceIndicator = ""
    if not source.placed:
        made.PatientOrientation = ""
    return made


def _put_frames(
    dataset: Any, shown: Mapping[str, np.ndarray], volume: Volume, source: Source, pixels: IO[bytes]
) -> None:
    """The frames of all masks, (I, J, K) or less in K, into `dataset`, with their places and sources, a bit a voxel.

    pixels: a file that they are packed into, which must be there when the dataset is saved. Done here since highdicom
    wants all masks in one array of bytes, which for many slices and targets fills the memory.
    """
    dataset.SourceImageSequence = source.references
    dataset.ReferencedSeriesSequence = [
        dataset_of(SeriesInstanceUID=source.series_uid, ReferencedInstanceSequence=source.references)
    ]
    shared = dataset.SharedFunctionalGroupsSequence[0]
    if "SegmentIdentificationSequence" in shared:
        del shared.SegmentIdentificationSequence
    if "DimensionOrganizationType" in dataset:
        del dataset.DimensionOrganizationType
    if source.placed and volume.heights is None and volume.shape[2] > 1:
        apart = float(np.diff(source.heights).mean())
        shared.PixelMeasuresSequence[0].SpacingBetweenSlices = DSfloat(apart, auto_format=True)
    count = next(iter(shown.values())).shape[2]
    stored = [k for k in range(count) if any(mask[:, :, k].any() for mask in shown.values())]
    dataset.SegmentsOverlap = "YES" if any(_overlap(shown, k) for k in stored) else "NO"
    groups, waiting = [], np.empty(0, bool)
    for number, mask in enumerate(shown.values(), start=1):
        for place, k in enumerate(stored, start=1):
            plane = mask[:, :, k].T != 0
            if not plane.any():
                continue
            groups.append(source.frame(k, number, place))
            bits = np.concatenate([waiting, plane.ravel()])
            whole = len(bits) // 8 * 8
            pixels.write(np.packbits(bits[:whole], bitorder="little").tobytes())
            waiting = bits[whole:]
        release(mask)
    pixels.write(np.packbits(waiting, bitorder="little").tobytes())
    pixels.write(b"\0" * (pixels.tell() % 2))
    pixels.seek(0)
    dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.NumberOfFrames = len(groups)
    dataset.PixelData = pixels


def _overlap(shown: Mapping[str, np.ndarray], k: int) -> bool:
    covered = np.zeros(next(iter(shown.values())).shape[:2], np.uint8)
    for mask in shown.values():
        covered += mask[:, :, k] != 0
    return bool((covered > 1).any())


def write_report(
    measured: Mapping[str, Measures], segmentation: Any, volume: Volume, path: Path, provenance: Mapping[str, str]
) -> None:
    """Write measurements as a Comprehensive 3D SR after TID 1500, one group per segment of the given SEG dataset.

    Raises ConfigError without highdicom, DataError where the source lacks what DICOM demands.
    """
    source = describe_source(volume, path.name)
    with _refusals(path, "SR"):
        with quiet(), disable_value_validation():
            report = _report(measured, segmentation, source, provenance, path)
        _save(report, path)


def _report(
    measured: Mapping[str, Measures], segmentation: Any, source: Source, provenance: Mapping[str, str], path: Path
) -> Any:
    hd = _highdicom(path)
    from pydicom.sr.codedict import codes

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
                    source_series=hd.sr.SourceSeriesForSegmentation(source.series_uid),
                ),
                finding_category=hd.sr.CodedConcept(
                    category.CodeValue, category.CodingSchemeDesignator, category.CodeMeaning
                ),
                finding_type=hd.sr.CodedConcept(kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning),
                algorithm_id=hd.sr.AlgorithmIdentification(
                    makers(provenance), long_string(provenance.get("ibisagent", "?"))
                ),
                measurements=[
                    hd.sr.Measurement(name=name, value=round(float(value), 4), unit=unit)
                    for name, value, unit in found
                    if value is not None
                ],
            )
        )
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
    return hd.sr.Comprehensive3DSR(
        evidence=[segmentation, *source.evidence],  # the first one is whom patient and study are taken from
        content=content,
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER + 1,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        series_description="Measurements by ibisagent, not for clinical use",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )


def _description(hd: Any, number: int, name: str, colour: Rgb, provenance: Mapping[str, str]) -> Any:
    from pydicom.sr.codedict import codes

    known = term(name)
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=_concept(hd, known.category),
        segmented_property_type=_concept(hd, known.kind),
        anatomic_regions=[_concept(hd, known.region)] if known.region else None,
        display_color=hd.color.CIELabColor.from_rgb(*colour),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=makers(provenance),
            family=codes.cid7162.ArtificialIntelligence,
            version=long_string(provenance.get("ibisagent", "unknown")),
        ),
        tracking_uid=hd.UID(),
        tracking_id=name[:64],
    )
    description.SegmentDescription = name[:1024]
    if known.modifier:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(hd, known.modifier)]
    return description


def _concept(hd: Any, code: Code) -> Any:
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


def _highdicom(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import highdicom
    except ImportError as error:
        raise ConfigError(f"{path.name}: needs highdicom: pip install 'ibisagent[medical]'") from error
    return highdicom


def _save(dataset: Any, path: Path) -> None:
    with quiet(), disable_value_validation(), appearing_whole(path) as part:
        dataset.save_as(part)


class _refusals:  # noqa: N801 - reads as what it is where it is used
    """highdicom's refusals become one DataError."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        ours = isinstance(error, IbisError)
        if isinstance(error, AttributeError | ValueError | TypeError | LookupError) and not ours:
            said = f"DICOM {self._kind} cannot be made of this source{told(error)}"
            raise DataError(f"{self._path.name}: {said}; ask for --format nifti") from error
