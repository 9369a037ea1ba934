"""Slices of a volume as images in radiological convention and at true aspect, and masks back onto the voxels."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ibisagent.domain import Image, Mask
from ibisagent.errors import ConfigError, DataError, TooLargeError
from ibisagent.imaging import limits
from ibisagent.volumes.grid import Volume
from ibisagent.volumes.windows import (
    HOUNSFIELD,
    PERCENTILES,
    Percentiles,
    Window,
    level_width,
    looks_like_hounsfield,
    parse_window,
    percentiles,
    shows,
)

AXES = ("auto", "axial", "coronal", "sagittal")
COARSE = 1.5
"""A voxel axis that many times coarser than the others is the one that the slices were acquired along."""

SLAB = 8
"""So is one that has that many times fewer voxels than both others, where all are equally fine."""

_ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}  # world axis that each plane is crossed by


class SliceView:
    """The slices of `volume` across one voxel axis.

    Axial: the patient's right on the left, anterior on top. Coronal: right on the left, superior on top. Sagittal:
    anterior on the left, superior on top. Oblique volumes are shown along the voxel axis that is nearest. Volumes that
    do not say how the patient lies are shown as stored. Slices are numbered as the volume's voxels are, from 0.
    Pixels are square: the coarser side is stretched to the spacing of the finer one.

    axis: "axial", "coronal", "sagittal", or "auto": across the coarsest voxel axis if it is COARSE, or the thin side of
    a SLAB, else axial. Slices at uneven distances are shown as they were acquired only.
    window: text for `windows.parse_window`. "auto" takes the file's own window where it shows something, else soft
    tissue for CT (also where the values look like Hounsfield units), else PERCENTILES.
    """

    def __init__(self, volume: Volume, axis: str = "auto", window: str = "auto") -> None:
        self.volume = volume
        self.axis, self.voxel_axis = _choose_axis(volume, axis)
        """Name of the plane, and the axis of the voxels (0 to 2) that the slices are taken across."""
        self._rows, self._columns, self._flips = _layout(volume, self.voxel_axis)
        self.window, self.window_source = _choose_window(volume, window)
        self.window_asked = window
        height, width = volume.shape[self._rows], volume.shape[self._columns]
        spacing = volume.spacing_mm[self._rows], volume.spacing_mm[self._columns]
        pixel = min(spacing)
        self.size = round(height * spacing[0] / pixel), round(width * spacing[1] / pixel)
        if self.size[0] * self.size[1] > limits.current().pixels:
            raise TooLargeError(
                f"{volume.name}: slices of {self.size[1]} x {self.size[0]} pixels; choose another --axis"
            )
        self._stretched = self.size != (height, width)
        self.pixel_mm = spacing[0] * height / self.size[0], spacing[1] * width / self.size[1]
        """(row, column) spacing of the images; of voxels in this plane in `plane_mm`."""
        self.plane_mm = spacing

    @property
    def count(self) -> int:
        """Number of slices."""
        return self.volume.shape[self.voxel_axis]

    @property
    def spacing_mm(self) -> float:
        """Distance of neighbouring slices."""
        return self.volume.spacing_mm[self.voxel_axis]

    def image(self, index: int) -> Image:
        """Slice `index` as an image."""
        plane = self._shown(self._take(self.volume.voxels, index))
        if self.volume.coloured:
            pixels = np.ascontiguousarray(plane)
        else:
            grey = self.window.apply(self.volume.values(plane))
            pixels = np.ascontiguousarray((255 - grey if self.volume.inverted else grey)[..., None].repeat(3, axis=2))
        if self._stretched:
            pixels = cv2.resize(pixels, self.size[::-1], interpolation=cv2.INTER_LINEAR)
        spacing = self.pixel_mm if self.volume.spacing_known else None
        return Image(pixels, spacing, source=f"{self.volume.name}, {self.axis} slice {index}")

    def read_mask(self, masks: np.ndarray, index: int) -> Mask:
        """Slice `index` of an (I, J, K) mask, as a (H, W) mask of the image."""
        plane = self.voxels_of(masks, index)
        if not self._stretched:
            return np.ascontiguousarray(plane)
        rows, columns = (_nearest(side, of) for side, of in zip(self.size, plane.shape, strict=True))
        return np.ascontiguousarray(plane[np.ix_(rows, columns)])

    def voxels_of(self, masks: np.ndarray, index: int) -> Mask:
        """Slice `index` of an (I, J, K) mask as displayed, but one pixel per voxel, of spacing `plane_mm`."""
        return self._shown(self._take(masks, index)).astype(bool)

    def plane(self, mask: Mask) -> Mask:
        """An image's mask on the voxels of its plane, as shown: one pixel per voxel, of spacing `plane_mm`."""
        if mask.shape != self.size:
            raise DataError(f"{self.volume.name}: a mask of {mask.shape}, its images are {self.size}")
        if not self._stretched:
            return mask
        shape = self.volume.shape[self._rows], self.volume.shape[self._columns]
        rows, columns = (_nearest(side, of) for side, of in zip(shape, self.size, strict=True))
        on_voxels: Mask = mask[np.ix_(rows, columns)]
        return on_voxels

    def write_mask(self, masks: np.ndarray, index: int, mask: Mask) -> None:
        """Put an image's (H, W) mask into slice `index` of an (I, J, K) array."""
        shown = self._shown(self._take(masks, index))  # a view: what is written there is written to `masks`
        shown[...] = self.plane(mask)

    def pixel(self, voxel: Sequence[int]) -> tuple[int, int, int]:
        """The slice that shows a voxel [i, j, k], and the column and row of its image where the voxel's centre is.

        Raises ConfigError for a voxel outside the volume.
        """
        shape = self.volume.shape
        if not all(0 <= at < side for at, side in zip(voxel, shape, strict=True)):
            raise ConfigError(f"voxel {list(voxel)} lies outside the volume of {' x '.join(map(str, shape))} voxels")
        places = []
        for axis, flip, side in zip((self._rows, self._columns), self._flips, self.size, strict=True):
            at = voxel[axis] if flip > 0 else shape[axis] - 1 - voxel[axis]
            places.append(int((at + 0.5) * side / shape[axis]))
        return voxel[self.voxel_axis], places[1], places[0]

    def _take(self, voxels: np.ndarray, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise ConfigError(f"{self.volume.name}: has slices 0 to {self.count - 1}, not {index}")
        where: list[slice | int] = [slice(None)] * 3
        where[self.voxel_axis] = index
        return voxels[tuple(where)]

    def _shown(self, plane: np.ndarray) -> np.ndarray:
        """A view of a plane of voxels with rows and columns as displayed."""
        if self._rows > self._columns:
            plane = plane.swapaxes(0, 1)
        return plane[:: self._flips[0], :: self._flips[1]]


def world_axes(volume: Volume) -> list[tuple[int, bool]]:
    """Per voxel axis the nearest world axis (0 to 2, each once) and whether it runs along it."""
    from nibabel.orientations import io_orientation

    return [(int(axis), flip > 0) for axis, flip in io_orientation(volume.affine)]


def _choose_axis(volume: Volume, axis: str) -> tuple[str, int]:
    if axis not in AXES:
        raise ConfigError(f"unknown axis '{axis}': give one of {', '.join(AXES)}")
    if not volume.oriented:
        if axis != "auto":
            raise ConfigError(f"{volume.name}: does not say how the patient lies, so there is no {axis} axis; leave it")
        return "stored", 2
    found = [world for world, _ in world_axes(volume)]
    if volume.heights is not None:
        acquired = next(name for name, world in _ACROSS.items() if world == found[2])
        if axis not in ("auto", acquired):
            raise ConfigError(
                f"{volume.name}: its slices are unevenly spaced, so only {acquired} ones are shown; leave --axis"
            )
        return acquired, 2
    if axis == "auto":
        spacing = volume.spacing_mm
        if min(volume.shape) == 1:
            return next(
                (name, found.index(world)) for name, world in _ACROSS.items() if volume.shape[found.index(world)] == 1
            )
        coarsest = int(np.argmax(spacing))
        others = max(spacing[other] for other in range(3) if other != coarsest)
        thin = int(np.argmin(volume.shape))
        is_slab = SLAB * volume.shape[thin] <= min(volume.shape[other] for other in range(3) if other != thin)
        fine = thin if is_slab else found.index(2)
        chosen = coarsest if spacing[coarsest] >= COARSE * others else fine
        return next(name for name, world in _ACROSS.items() if world == found[chosen]), chosen
    return axis, found.index(_ACROSS[axis])


def _layout(volume: Volume, across: int) -> tuple[int, int, tuple[int, int]]:
    """Voxel axes of rows and columns, and the steps (1 or -1) that bring both into display order.

    Rows go towards posterior or inferior, columns towards left or posterior: against the world's axes, always.
    """
    if not volume.oriented:
        return 1, 0, (1, 1)
    axes = world_axes(volume)
    world = [found for found, _ in axes]
    shown = [other for other in range(3) if other != axes[across][0]]
    columns, rows = world.index(shown[0]), world.index(shown[1])
    return rows, columns, (-1 if axes[rows][1] else 1, -1 if axes[columns][1] else 1)


def _choose_window(volume: Volume, text: str) -> tuple[Window, str]:
    """The window, and as text where it comes from."""
    wanted = parse_window(text)
    if volume.coloured:
        return Window(0, 255), "colours as stored"
    if isinstance(wanted, Window):
        return wanted, "as given"
    if isinstance(wanted, str):
        if volume.modality not in ("", "CT"):
            raise ConfigError(
                f"{volume.name}: window '{wanted}' is for Hounsfield units, this is {volume.modality};"
                " give LEVEL/WIDTH or 1-99%"
            )
        return level_width(*HOUNSFIELD[wanted]), wanted
    values = volume.sample()
    hounsfield = volume.modality == "CT" or (not volume.modality and looks_like_hounsfield(values))
    if wanted is None and volume.window is not None and shows(volume.window, values, hounsfield=hounsfield):
        return volume.window, "the file's own"
    if wanted is None and hounsfield:
        return level_width(*HOUNSFIELD["soft tissue"]), "soft tissue"
    share = wanted or Percentiles(*PERCENTILES)
    low, high = percentiles(values, share)
    spurned = "" if wanted is not None or volume.window is None else ", as the file's own window shows nothing of them"
    return Window(low, high), f"{share.low:g} to {share.high:g} % of the values{spurned}"


def _nearest(count: int, of: int) -> np.ndarray:
    """For `count` pixels spread over `of` others, the one that each centre lies in."""
    return ((np.arange(count) + 0.5) * of / count).astype(np.intp)
