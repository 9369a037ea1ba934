"""NRRD and MetaImage in, by SimpleITK."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np

from ibisagent import limits
from ibisagent.errors import ConfigError, DataError
from ibisagent.volumes.grid import LPS, Volume, choose_channel

_SIDES = re.compile(rb"^\s*(?:NDims\s*=|dimension:)\s*(\S*)", re.MULTILINE | re.IGNORECASE)
_COMPRESSED = re.compile(rb"^\s*CompressedDataSize\s*=\s*(\S*)", re.MULTILINE | re.IGNORECASE)
_ELSEWHERE = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file:)[ \t]*([^\r\n]*)", re.MULTILINE | re.IGNORECASE)
_MOST_SIDES = 5
_MOST_FILES = 2**14


def read_itk(path: Path, channel: int | None) -> Volume:
    """An NRRD or MetaImage file; see `volumes.read_volume`."""
    try:
        import SimpleITK as sitk  # noqa: N813 - its own documents write it so
    except ImportError as error:
        raise ConfigError(f"{path}: needs SimpleITK: pip install 'ibisagent[medical]'") from error
    _check_header(path)
    try:
        header = sitk.ImageFileReader()
        header.SetFileName(str(path))
        header.ReadImageInformation()
        kind, parts = header.GetPixelID(), header.GetNumberOfComponents()
        vector = "vector" in sitk.GetPixelIDValueAsString(kind)
        one = sitk.GetArrayViewFromImage(sitk.Image([1, 1], kind, 1 if vector else 0))
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


def _check_header(path: Path) -> None:
    """DataError for what ITK trusts: the number of sides, the size of compressed data, files that lie anywhere."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.find(b"\n\n") if content[:4] == b"NRRD" else -1
        found = _ELSEWHERE.search(content, 0, end if end > 0 else len(content))
        end = end if end > 0 else found.end() if found else len(content)
        for said in _SIDES.findall(content, 0, end):
            if not (said.isdigit() and 0 < int(said[:9]) <= _MOST_SIDES):
                raise DataError(f"{path}: has {_text(said)} sides, 2 to 4 are read; save a volume of real numbers")
        for said in _COMPRESSED.findall(content, 0, end):
            if not (said.isdigit() and int(said[:20]) <= len(content)):
                raise DataError(f"{path}: says that its voxels are {_text(said)} bytes of the file; copy it again")
        named = found[1].strip() if found else b"LOCAL"
        if named == b"LOCAL":
            return
        names = [named]
        if named.upper().startswith(b"LIST"):
            names = content[end:].split(b"\n", _MOST_FILES)[:_MOST_FILES]
        for name in names:
            place = Path(_text(name))
            if place.is_absolute() or ".." in place.parts:
                raise DataError(f"{path}: its voxels are in '{place}', outside its folder; put both in one folder")


def _text(said: bytes) -> str:
    return said[:80].decode("latin-1").strip()
