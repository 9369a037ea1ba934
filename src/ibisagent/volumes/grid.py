"""A volume: voxels, where they are in the world, and where they came from."""

from __future__ import annotations

import hashlib
import math
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import DataError
from ibisagent.imaging import limits
from ibisagent.volumes.windows import Window

SCRATCH_BYTES = 64 * 2**20
_BLOCK = 64
OFF_GRID = 0.05
"""By which share of the coarsest spacing voxels may lie beside an even grid, or two grids beside each other, and still
count as one. The reader of slices and those of masks share it: a mask of ours is always taken back."""
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From DICOM's and ITK's world (x left, y posterior) to ours (x right, y anterior), and back."""


@dataclass(frozen=True, slots=True, eq=False)
class NiftiOrigin:
    """The header to write masks with; `affine` in the file's own unit."""

    header: Any
    affine: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class DicomOrigin:
    """Where the slices k = 0, 1, ... are: file and frame (from 0), and where each says that it lies.

    positions: (K, 3) millimetres in DICOM's world (LPS) of the slices' first voxels, which may wobble about the even
    grid; None where the files do not say. tiled: the slices are tiles of one frame (a mosaic).
    """

    frames: tuple[tuple[Path, int], ...]
    positions: np.ndarray | None = None
    tiled: bool = False


@dataclass(frozen=True, eq=False)
class Volume:
    """One scalar or colour volume.

    voxels: (I, J, K) as stored, or (I, J, K, 3) uint8 RGB; may lie in a file. slope, intercept: stored to real values.
    affine: (4, 4), takes (i, j, k, 1) of a voxel's centre to world millimetres, where x grows towards the patient's
    right, y towards anterior, z towards superior (RAS+, as in NIfTI; DICOM's x and y with the other sign). For DICOM i
    is the column, j the row, k the place along the slices' normal (row direction x column direction), lowest first.
    oriented: False where the file does not say how the patient lies (photographs, plain X-rays, cine loops); then the
    affine holds the spacing only, and spacing_known says whether even that is known.
    name: short name for files and records; made from a hash for DICOM, so that it tells nothing of the patient.
    modality: DICOM's code ("CT", "MR", ...) or "". window: the file's own; inverted: low values are white.
    heights: where the slices k lie along their normal, in millimetres from the first, if their distances differ; the
    affine then takes the first and the last slice to their places and those between to even ones. notes: what the
    reader passed over or took in another way than the file says, a line each.
    """

    voxels: np.ndarray
    affine: np.ndarray
    name: str
    slope: float = 1.0
    intercept: float = 0.0
    modality: str = ""
    oriented: bool = True
    spacing_known: bool = True
    window: Window | None = None
    inverted: bool = False
    heights: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    origin: NiftiOrigin | DicomOrigin | None = None

    def __post_init__(self) -> None:
        shape = self.voxels.shape
        if not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3 and self.voxels.dtype == np.uint8)):
            raise DataError(f"{self.name}: expected (I, J, K) or (I, J, K, 3) uint8, got {shape} {self.voxels.dtype}")
        if 0 in shape:
            raise DataError(f"{self.name}: has no voxels ({' x '.join(map(str, shape))})")
        affine = self.affine
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise DataError(f"{self.name}: its affine does not place voxels in space; correct the header")

    @property
    def sha256(self) -> str:
        """Hash of voxels, their meaning and their place."""
        digest = hashlib.sha256(repr((self.shape, str(self.voxels.dtype), self.slope, self.intercept)).encode())
        digest.update(np.ascontiguousarray(self.affine, dtype="<f8").tobytes())
        for plane in planes(self.voxels):
            digest.update(plane.tobytes())
        return digest.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I, J, K)."""
        first, second, third = self.voxels.shape[:3]
        return first, second, third

    @property
    def coloured(self) -> bool:
        """Whether voxels are RGB."""
        return self.voxels.ndim == 4

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels' centres along i, j, k."""
        first, second, third = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(first), float(second), float(third)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres, slanted ones included."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def tolerance_mm(self) -> float:
        """How far two places may lie apart and count as one on this grid; see `OFF_GRID`."""
        return tolerance_mm(self.affine)

    def slice_share(self, k: int) -> float:
        """The extent of slice k along the normal, in units of the affine's step: half way to both neighbours.

        1 on an even grid. The outermost slices reach out as far as they reach in.
        """
        if self.heights is None:
            return 1.0
        gaps = np.diff(self.heights)
        reach = (gaps[max(k - 1, 0)] + gaps[min(k, len(gaps) - 1)]) / 2
        return float(reach / gaps.mean())

    def voxel_places(self, world: np.ndarray) -> np.ndarray:
        """World points (N, 3) in millimetres as continuous voxel indices (N, 3); slices count at their own heights."""
        found: np.ndarray = world @ np.linalg.inv(self.affine[:3, :3]).T - np.linalg.solve(
            self.affine[:3, :3], self.affine[:3, 3]
        )
        if self.heights is not None:
            step = float(np.mean(np.diff(self.heights)))
            high = found[:, 2] * step
            beyond = high - high.clip(self.heights[0], self.heights[-1])
            found[:, 2] = np.interp(high, self.heights, np.arange(len(self.heights))) + beyond / step
        return found

    def values(self, stored: np.ndarray) -> np.ndarray:
        """Stored voxels as real values (Hounsfield units, ...), float32."""
        real: np.ndarray = stored.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)
        return real

    def sample(self, count: int = 2_000_000) -> np.ndarray:
        """About `count` finite values, evenly spread: what percentiles are taken of. DataError if there is none."""
        step = max(1, round((self.voxels.size / count) ** (1 / 3)))
        read = self.values(np.ascontiguousarray(self.voxels[::step, ::step, ::step]))
        values: np.ndarray = read[np.isfinite(read)]
        if not values.size:
            raise DataError(f"{self.name}: holds no finite value; export it again")
        return values


def scratch(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A zeroed array; a large one lies in a temporary file that vanishes with it, so that memory stays free.

    TooLargeError beyond the limits.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    limits.check_unpacked(size, f"a volume of {' x '.join(map(str, shape))}")
    if size < SCRATCH_BYTES:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(prefix="ibisagent-") as file:  # numpy keeps the file mapped
        mapped: np.ndarray = np.memmap(file, dtype, "w+", shape=shape)
        return mapped


def scratch_mask(shape: tuple[int, int, int]) -> np.ndarray:
    """A `scratch` mask (I, J, K) bool whose slices k lie together, as they are written and read."""
    return scratch(shape[::-1], bool).transpose()


def release(array: np.ndarray) -> None:
    """Give back the memory that the parts of a large `scratch` array fill which were touched; they stay in its file."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def planes(voxels: np.ndarray) -> Iterator[np.ndarray]:
    """The planes i = 0, 1, ... of an array (I, ...), each in one piece, however the array lies in memory."""
    for first in range(0, len(voxels), _BLOCK):
        yield from np.ascontiguousarray(voxels[first : first + _BLOCK])
        release(voxels)


def tolerance_mm(affine: np.ndarray) -> float:
    """How far two places may lie apart and count as one on the grid of `affine`; see `OFF_GRID`."""
    return OFF_GRID * float(np.linalg.norm(affine[:3, :3], axis=0).max())


def places_off_mm(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> float:
    """How far two affines put the corners of a grid of `shape` (I, J, K) apart along the worst axis, in millimetres."""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
    corners[:, :3] *= np.array(shape) - 1
    return float(np.abs(corners @ (a - b).T).max())


def choose_channel(count: int, channel: int | None, where: str) -> int:
    """Which of `count` volumes on one grid; DataError unless `channel` says so where there is more than one."""
    if channel is None and count == 1:
        return 0
    if channel is None or not 0 <= channel < count:
        asked = "" if channel is None else f", none is number {channel}"
        raise DataError(f"{where}: holds {count} volumes on one grid{asked}; choose with --channel 0 to {count - 1}")
    return channel
