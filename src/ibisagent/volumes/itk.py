"""NRRD and MetaImage in, by SimpleITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ibisagent import limits
from ibisagent.errors import ConfigError, DataError
from ibisagent.volumes.grid import LPS, Volume, choose_channel


def read_itk(path: Path, channel: int | None) -> Volume:
    """An NRRD or MetaImage file; see `volumes.read_volume`."""
    try:
        import SimpleITK as sitk  # noqa: N813 - its own documents write it so
    except ImportError as error:
        raise ConfigError(f"{path}: needs SimpleITK: pip install 'ibisagent[medical]'") from error
    try:
        header = sitk.ImageFileReader()
        header.SetFileName(str(path))
        header.ReadImageInformation()
        kind, parts = header.GetPixelID(), header.GetNumberOfComponents()
        one = sitk.GetArrayViewFromImage(sitk.Image([1, 1], kind, parts if parts > 1 else 0))
        limits.check_voxels(header.GetSize(), path, bytes_each=one.dtype.itemsize * parts)
        image = sitk.ReadImage(str(path))
        stored = sitk.GetArrayFromImage(image)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][-160:]
        raise DataError(f"{path}: damaged, cut off or incomplete ({reason}); export or copy it again") from error
    sides, parts = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if sides not in (2, 3, 4) or stored.dtype.kind not in "buif":
        raise DataError(f"{path}: has {sides} sides of {stored.dtype} values; save a volume of real numbers")
    coloured = parts == 3 and stored.dtype == np.uint8 and sides < 4 and channel is None
    volumes = stored if parts > 1 else stored[..., None]
    if sides == 4:
        volumes = np.moveaxis(volumes, 0, -2).reshape(*volumes.shape[1:4], -1)
    elif sides == 2:
        volumes = volumes[None]
    if not coloured:
        volumes = volumes[..., choose_channel(volumes.shape[-1], channel, str(path))]
    space = min(sides, 3)
    direction = np.eye(3)
    direction[:space, :space] = np.reshape(image.GetDirection(), (sides, sides))[:space, :space]
    spacing, corner = np.ones(3), np.zeros(3)
    spacing[:space], corner[:space] = image.GetSpacing()[:space], image.GetOrigin()[:space]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing, corner
    voxels = volumes.swapaxes(0, 2)
    return Volume(voxels, LPS @ affine, path.stem, oriented=sides > 2)
