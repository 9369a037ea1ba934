"""The frames of DICOM images: where each lies in the patient, and which of them form one stack of slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import DataError
from ibisagent.volumes.grid import LPS, OFF_GRID, choose_channel
from ibisagent.volumes.headers import attribute, first_item, first_number, frame_count, numbers, quiet

PARALLEL = 1e-2
"""By how much the direction cosines of slices of one stack may differ."""

_TIMES = ("TemporalPositionIdentifier", "EchoNumbers", "TriggerTime", "AcquisitionNumber", "InstanceNumber")
_SAME_HEIGHT_MM = 1e-3
_SHOWN = 8


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame: where it is stored, and where it lies in the patient; None where the file does not say.

    size: (rows, columns). spacing: millimetres between rows and between columns. thickness: millimetres, 1 where
    unknown. tile: rows and columns of the stored frame that it is, where that is a mosaic. order: sorts the frames of
    one place.
    """

    path: Path
    index: int
    size: tuple[int, int]
    spacing: tuple[float, float] | None
    orientation: np.ndarray | None
    position: np.ndarray | None
    thickness: float
    rescale: tuple[float, float]
    order: tuple[float, ...]
    tile: tuple[slice, slice] | None = None

    @property
    def placed(self) -> bool:
        """Whether it says where it lies."""
        return self.orientation is not None and self.position is not None

    def beside(self, other: Frame) -> bool:
        """Whether the two may be slices of one stack: as large, parallel, pixels as far apart to the last of them."""
        if self.size != other.size or self.placed != other.placed:
            return False
        if (self.spacing is None) != (other.spacing is None):
            return False
        if self.spacing is not None and other.spacing is not None:
            for mine, theirs, count in zip(self.spacing, other.spacing, self.size, strict=True):
                if abs(mine - theirs) * count > OFF_GRID * mine:
                    return False
        if self.orientation is None or other.orientation is None:
            return True
        return bool(np.abs(self.orientation - other.orientation).max() <= PARALLEL)


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Slices in order, and their grid as `Volume` has it.

    positions: (K, 3) as the files say (LPS), None where they do not. notes: what was passed over, a line each.
    """

    frames: tuple[Frame, ...]
    affine: np.ndarray
    positions: np.ndarray | None
    heights: tuple[float, ...] | None
    spacing_known: bool
    notes: tuple[str, ...]


def frames_of(path: Path, header: Any) -> list[Frame]:
    """The frames of one file, as its functional groups, its dose grid or its own attributes place them."""
    count = frame_count(header, path)
    shared = first_item(header, "SharedFunctionalGroupsSequence")
    each = header.get("PerFrameFunctionalGroupsSequence") or []
    if each and len(each) != count:
        raise ValueError(f"describes {len(each)} frames and holds {count}")
    offsets = header.get("GridFrameOffsetVector")
    size = int(header.Rows), int(header.Columns)
    frames = []
    for index in range(count):
        groups = [group for group in (each[index] if each else None, shared) if group is not None]
        orientation = numbers(attribute(header, groups, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
        position = numbers(attribute(header, groups, "PlanePositionSequence", "ImagePositionPatient"), 3)
        if count > 1 and not each:
            if offsets is not None and position is not None and orientation is not None and len(offsets) == count:
                shift = float(offsets[index]) - (float(offsets[0]) if float(offsets[0]) else 0.0)
                position = position + _normal(orientation) * shift
            else:
                orientation = position = None  # a loop in time, or frames whose places are not told
        spacing = numbers(attribute(header, groups, "PixelMeasuresSequence", "PixelSpacing"), 2)
        if spacing is None and "ImagerPixelSpacing" in header:
            spacing = numbers(header.ImagerPixelSpacing, 2)
        slope = attribute(header, groups, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = attribute(header, groups, "PixelValueTransformationSequence", "RescaleIntercept")
        if slope in (None, "") and header.get("DoseGridScaling"):
            slope = header.DoseGridScaling
        thickness = first_number(attribute(header, groups, "PixelMeasuresSequence", "SliceThickness"))
        frames.append(
            Frame(
                path,
                index,
                size,
                None if spacing is None or (spacing <= 0).any() else (float(spacing[0]), float(spacing[1])),
                orientation,
                position,
                thickness if thickness > 0 else 1.0,
                (float(1 if slope in (None, "") else slope), float(0 if intercept in (None, "") else intercept)),
                (*(first_number(header.get(name)) for name in _TIMES), float(index)),
            )
        )
    kinds = header.get("ImageType") or ()
    if "MOSAIC" in ([kinds] if isinstance(kinds, str) else list(kinds)) and count == 1:
        return _tiles(frames[0], header)
    return frames


def _tiles(mosaic: Frame, header: Any) -> list[Frame]:
    """The slices that Siemens scanners tile in one image, first row first, with their places.

    The position of the header is that of a slice as large as the whole mosaic, around the same middle. How many tiles
    there are and which way they follow each other only the private CSA header says; DataError without it.
    """
    with quiet():  # it warns of being experimental
        from nibabel.nicom.csareader import get_csa_header, get_n_mosaic, get_slice_normal

        csa = get_csa_header(header)
    count, normal = (None, None) if csa is None else (get_n_mosaic(csa), get_slice_normal(csa))
    apart = first_number(header.get("SpacingBetweenSlices"))
    if not count or normal is None or apart <= 0 or not mosaic.placed or mosaic.spacing is None:
        raise DataError(
            f"{mosaic.path}: is a mosaic of slices without the private header that says where they lie;"
            " export it with private elements, or convert it to NIfTI"
        )
    across = math.ceil(math.sqrt(count))
    rows, columns = mosaic.size[0] // across, mosaic.size[1] // across
    orientation, corner = np.asarray(mosaic.orientation), np.asarray(mosaic.position)
    corner = corner + orientation[:3] * mosaic.spacing[1] * (mosaic.size[1] - columns) / 2
    corner = corner + orientation[3:] * mosaic.spacing[0] * (mosaic.size[0] - rows) / 2
    tiles = []
    for number in range(count):
        row, column = number // across * rows, number % across * columns
        tiles.append(
            replace(
                mosaic,
                size=(rows, columns),
                position=corner + np.asarray(normal, float) * apart * number,
                tile=(slice(row, row + rows), slice(column, column + columns)),
            )
        )
    return tiles


def stacks_of(frames: Sequence[Frame]) -> list[list[Frame]]:
    """The frames in stacks of parallel slices of one size and spacing, in the order in which they appear."""
    stacks: list[list[Frame]] = []
    for frame in frames:
        own = next((stack for stack in stacks if stack[0].beside(frame)), None)
        if own is None:
            stacks.append([frame])
        else:
            own.append(frame)
    return stacks


def arrange(frames: Sequence[Frame], channel: int | None, stack: int | None, where: str) -> Stack:
    """The slices of one stack: number `stack` from 1, or the one of the most slices; `channel` as `read_volume` has it.

    DataError where two stacks have as many and none is chosen, or a slice is missing.
    """
    stacks = stacks_of(frames)
    chosen, notes = _choose(stacks, stack, where)
    first = chosen[0]
    spacing = first.spacing or (1.0, 1.0)
    known = first.spacing is not None
    if not first.placed:
        affine = np.diag([spacing[1], spacing[0], 1.0, 1.0])
        return Stack(tuple(sorted(chosen, key=lambda frame: frame.order)), affine, None, None, known, notes)
    orientation = np.asarray(first.orientation)
    across, down = orientation[:3], orientation[3:]
    normal = _normal(orientation)
    if abs(np.linalg.norm(across) - 1) > 0.01 or abs(np.linalg.norm(normal) - 1) > 0.01:
        raise DataError(f"{where}: states an impossible orientation; correct ImageOrientationPatient")
    places = _by_height(chosen, normal)
    counts = {len(place) for place in places}
    if len(counts) > 1:
        raise DataError(
            f"{where}: has {min(counts)} slices at some places and {max(counts)} at others; one may be missing or twice"
        )
    index = choose_channel(counts.pop(), channel, where)
    slices = [sorted(place, key=lambda frame: frame.order)[index] for place in places]
    positions = np.array([frame.position for frame in slices])
    heights = _check_places(positions, normal, where)
    step = (positions[-1] - positions[0]) / (len(slices) - 1) if len(slices) > 1 else normal * slices[0].thickness
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * spacing[1], down * spacing[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    if heights is not None:
        gaps = np.diff(heights)
        notes += (f"its slices are {gaps.min():.3g} to {gaps.max():.3g} mm apart: each is taken for itself",)
    return Stack(tuple(slices), LPS @ affine, positions, heights, known, notes)


def _choose(stacks: Sequence[list[Frame]], stack: int | None, where: str) -> tuple[list[Frame], tuple[str, ...]]:
    if stack is not None and not 1 <= stack <= len(stacks):
        raise DataError(f"{where}: has {len(stacks)} stacks of slices, none is number {stack}")
    if len(stacks) == 1:
        return stacks[0], ()
    listed = [f"{number} ({_described(one)})" for number, one in enumerate(stacks, 1)]
    shown = ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
    most = max(len(one) for one in stacks)
    largest = [one for one in stacks if len(one) == most]
    if stack is None and len(largest) > 1:
        raise DataError(
            f"{where}: its slices form {len(stacks)} stacks of other sizes or directions: {shown};"
            " choose with --series SERIES/STACK, such as 1/2"
        )
    chosen = largest[0] if stack is None else stacks[stack - 1]
    others = ", ".join(_described(one) for one in stacks if one is not chosen)
    reason = "the largest stack" if stack is None else f"stack {stack}"
    return chosen, (f"{reason} of {len(stacks)} is read ({_described(chosen)}), not {others[:200]}",)


def _described(stack: Sequence[Frame]) -> str:
    rows, columns = stack[0].size
    if stack[0].orientation is None:
        return f"{len(stack)} of {columns} x {rows} without a place"
    lying = int(np.abs(_normal(stack[0].orientation)).argmax())
    return f"{len(stack)} {('sagittal', 'coronal', 'axial')[lying]} of {columns} x {rows}"


def _by_height(frames: Sequence[Frame], normal: np.ndarray) -> list[list[Frame]]:
    """The frames of each place along the normal, lowest first."""
    places: list[list[Frame]] = []
    last = -math.inf
    for frame in sorted(frames, key=lambda frame: float(normal @ np.asarray(frame.position))):
        height = float(normal @ np.asarray(frame.position))
        if height - last < _SAME_HEIGHT_MM:
            places[-1].append(frame)
        else:
            last = height
            places.append([frame])
    return places


def _check_places(positions: np.ndarray, normal: np.ndarray, where: str) -> tuple[float, ...] | None:
    """Heights of slices at (K, 3) positions where their distances differ, None where they are even.

    DataError where they do not lie on a line, or a slice is missing: where single distances are multiples of the
    others. A distance that changes for good is how heads were scanned slice by slice.
    """
    if len(positions) < 3:
        return None
    heights = (positions - positions[0]) @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    line = positions[0] + (heights / heights[-1])[:, None] * (positions[-1] - positions[0])
    if np.abs(positions - line).max() > max(OFF_GRID * usual, 0.01):
        raise DataError(f"{where}: its slices do not lie on a line; keep one stack in the folder")
    odd = np.abs(gaps - usual) > OFF_GRID * usual
    even = np.linspace(0, heights[-1], len(heights))
    if not odd.any() and np.abs(heights - even).max() <= max(OFF_GRID * usual, 0.01):
        return None
    times = gaps[odd] / usual
    multiples = odd.any() and bool(
        (np.abs(times - np.rint(times)) <= 2 * OFF_GRID).all() and (np.rint(times) > 1).all()
    )
    if multiples and not (odd[1:] & odd[:-1]).any():
        gap = int(np.argmax(gaps))
        raise DataError(
            f"{where}: slices {gap} and {gap + 1} are {gaps[gap]:.2f} mm apart, the others {usual:.2f} mm:"
            " a slice is missing; complete the series"
        )
    return tuple(float(height) for height in heights)


def _normal(orientation: np.ndarray) -> np.ndarray:
    return np.cross(orientation[:3], orientation[3:])
