"""A volume: voxels, where they are in the world, and where they came from."""

from __future__ import annotations

import hashlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import DataError
from ibisagent.imaging import limits
from ibisagent.volumes.windows import Window

SCRATCH_BYTES = 64 * 2**20
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From DICOM's and ITK's world (x left, y posterior) to ours (x right, y anterior), and back."""


@dataclass(frozen=True, slots=True, eq=False)
class NiftiOrigin:
    """The header to write masks with; `affine` in the file's own unit."""

    header: Any
    affine: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class DicomOrigin:
    """Where the slices k = 0, 1, ... are: file and frame (from 0)."""

    frames: tuple[tuple[Path, int], ...]


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
        for plane in self.voxels:
            digest.update(np.ascontiguousarray(plane).tobytes())
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


def choose_channel(count: int, channel: int | None, where: str) -> int:
    """Which of `count` volumes on one grid; DataError unless `channel` says so where there are several."""
    if channel is None and count == 1:
        return 0
    if channel is None or not 0 <= channel < count:
        asked = "" if channel is None else f", none is number {channel}"
        raise DataError(f"{where}: holds {count} volumes on one grid{asked}; choose with --channel 0 to {count - 1}")
    return channel
