"""DICOM segmentations (SEG) onto the grid of a volume, by pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import DataError
from ibisagent.imaging import limits
from ibisagent.volumes.dicom import check_compressed_frames
from ibisagent.volumes.grid import LPS, Volume, scratch_mask
from ibisagent.volumes.headers import (
    attribute,
    first_item,
    frame_count,
    numbers,
    quiet,
    read_header,
    turning_damage_into_one_line,
)


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
        by_number = {number: scratch_mask(volume.shape) for number in labels}
        shared = first_item(dataset, "SharedFunctionalGroupsSequence")
        labelmap = str(dataset.get("SegmentationType", "")) == "LABELMAP"
        check_compressed_frames(dataset, path)
        frames = dataset.pixel_array  # not frame by frame: pydicom 3.0 cannot, where a frame ends within a byte
        frames = frames if frames.ndim == 3 else frames[None]
        for group, pixels in zip(dataset.PerFrameFunctionalGroupsSequence, frames, strict=True):
            voxels = _voxels_of(path, dataset, [item for item in (group, shared) if item is not None], volume)
            if labelmap:
                for number, mask in by_number.items():
                    mask[voxels] = pixels == number
            else:
                identified = first_item(group, "SegmentIdentificationSequence") or first_item(
                    shared, "SegmentIdentificationSequence"
                )
                by_number[int(identified.ReferencedSegmentNumber)][voxels] = pixels != 0
    named: dict[str, np.ndarray] = {}
    for number, label in labels.items():
        named[label if label not in named else f"{label} ({number})"] = by_number[number]
    return named


def _voxels_of(path: Path, dataset: Any, groups: list[Any], volume: Volume) -> tuple[np.ndarray, ...]:
    """The voxels (i, j, k) of the volume that the pixels of a frame are, each of its indices (rows, columns).

    Frames may lie across any axis of the volume, run either way along it, and show a part of it.
    """
    orientation = numbers(attribute(dataset, groups, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    position = numbers(attribute(dataset, groups, "PlanePositionSequence", "ImagePositionPatient"), 3)
    spacing = numbers(attribute(dataset, groups, "PixelMeasuresSequence", "PixelSpacing"), 2)
    if orientation is None or position is None or spacing is None:
        raise DataError(f"{path}: does not say where its frames lie; write it again")
    size = int(dataset.Rows), int(dataset.Columns)
    steps = orientation[3:] * spacing[0], orientation[:3] * spacing[1]
    far = [position, *(position + step * (count - 1) for step, count in zip(steps, size, strict=True))]
    near, down, right = volume.voxel_places(np.array(far) @ LPS[:3, :3])
    first = np.rint(near)
    along = [np.rint((end - near) / max(count - 1, 1)) for end, count in ((down, size[0]), (right, size[1]))]
    if size[0] == 1 or size[1] == 1:  # a lone row or column says nothing of where the next would be
        turned = np.linalg.solve(volume.affine[:3, :3], (np.array(steps) @ LPS[:3, :3]).T).T
        along = [np.rint(step) for step in turned]
    last = [first + step * (count - 1) for step, count in zip(along, size, strict=True)]
    places = np.array([first, *last, last[0] + last[1] - first])
    off = np.array([near, down, right]) - places[:3]
    inside = (places >= 0).all() and (places < volume.shape).all()
    if (
        not inside
        or np.abs(off * volume.spacing_mm).max() > volume.tolerance_mm
        or any(abs(a).sum() != 1 for a in along)
    ):
        raise DataError(f"{path}: a frame lies beside the grid of {volume.name}; give the segmentation of this volume")
    rows, columns = np.arange(size[0])[:, None], np.arange(size[1])[None]
    axes = zip(first.astype(int), along[0].astype(int), along[1].astype(int), strict=True)
    return tuple(start + down * rows + right * columns for start, down, right in axes)
