"""DICOM segmentations (SEG) onto the grid of a volume, by pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ibisagent.errors import DataError
from ibisagent.imaging import limits
from ibisagent.volumes.dicom import (
    SEGMENTATIONS,
    attribute,
    check_compressed_frames,
    first_item,
    frame_count,
    numbers,
    quiet,
    read_header,
    turning_damage_into_one_line,
)
from ibisagent.volumes.grid import LPS, Volume, scratch

_OFF_GRID = 0.05
"""Share of a voxel by which a frame may lie beside the grid."""


def is_segmentation(path: Path) -> bool:
    """Whether the file is a DICOM segmentation."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return False
    return str(read_header(path).get("SOPClassUID", "")) in SEGMENTATIONS


def read_segmentation(path: Path, volume: Volume) -> dict[str, np.ndarray]:
    """The segments of a DICOM SEG file by label, each (I, J, K) bool on the grid of `volume`.

    DataError if a frame lies beside the grid, or the file is damaged.
    """
    import pydicom

    header = read_header(path)
    with turning_damage_into_one_line(str(path)), quiet():
        count = frame_count(header, path)
        limits.check_frames(count, path)
        limits.check_voxels((int(header.Columns), int(header.Rows), count), path)
        dataset = pydicom.dcmread(path)
        labels = {int(item.SegmentNumber): str(item.SegmentLabel) for item in dataset.SegmentSequence}
        by_number = {number: scratch(volume.shape, bool) for number in labels}
        if (int(dataset.Columns), int(dataset.Rows)) != volume.shape[:2]:
            raise DataError(
                f"{path}: has {dataset.Columns} x {dataset.Rows} pixels, {volume.name} has"
                f" {volume.shape[0]} x {volume.shape[1]}; give the segmentation of this volume"
            )
        shared = first_item(dataset, "SharedFunctionalGroupsSequence")
        labelmap = str(dataset.get("SegmentationType", "")) == "LABELMAP"
        check_compressed_frames(dataset, path)
        frames = dataset.pixel_array  # not frame by frame: pydicom 3.0 cannot, where a frame ends within a byte
        frames = frames if frames.ndim == 3 else frames[None]
        for group, pixels in zip(dataset.PerFrameFunctionalGroupsSequence, frames, strict=True):
            k = _slice_of(path, dataset, [item for item in (group, shared) if item is not None], volume)
            if labelmap:
                for number, mask in by_number.items():
                    mask[:, :, k] = (pixels == number).T
            else:
                identified = first_item(group, "SegmentIdentificationSequence") or first_item(
                    shared, "SegmentIdentificationSequence"
                )
                by_number[int(identified.ReferencedSegmentNumber)][:, :, k] = (pixels != 0).T
    named: dict[str, np.ndarray] = {}
    for number, label in labels.items():
        named[label if label not in named else f"{label} ({number})"] = by_number[number]
    return named


def _slice_of(path: Path, dataset: object, groups: list[object], volume: Volume) -> int:
    """The slice k of the volume that a frame covers."""
    orientation = numbers(attribute(dataset, groups, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    position = numbers(attribute(dataset, groups, "PlanePositionSequence", "ImagePositionPatient"), 3)
    spacing = numbers(attribute(dataset, groups, "PixelMeasuresSequence", "PixelSpacing"), 2)
    if orientation is None or position is None or spacing is None:
        raise DataError(f"{path}: does not say where its frames lie; write it again")
    frame = np.eye(4)
    frame[:3, 0], frame[:3, 1], frame[:3, 3] = orientation[:3] * spacing[1], orientation[3:] * spacing[0], position
    on_grid = np.linalg.inv(volume.affine) @ LPS @ frame
    k = round(float(on_grid[2, 3]))
    expected = np.zeros((4, 3))
    expected[0, 0] = expected[1, 1] = 1
    expected[2:, 2] = k, 1
    far = np.array([[volume.shape[0] - 1, 0, 0], [0, volume.shape[1] - 1, 0], [0, 0, 1]])
    if not 0 <= k < volume.shape[2] or np.abs((on_grid[:, [0, 1, 3]] - expected) @ far).max() > _OFF_GRID:
        raise DataError(f"{path}: a frame lies beside the grid of {volume.name}; give the segmentation of this volume")
    return k
