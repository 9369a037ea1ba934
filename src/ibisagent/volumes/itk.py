"""NRRD and MetaImage in, NRRD out, by SimpleITK."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np

from ibisagent.errors import ConfigError, DataError
from ibisagent.files import appearing_whole, one_line
from ibisagent.imaging import limits
from ibisagent.volumes.grid import LPS, Volume, choose_channel

_MOST_SIDES = 5
_MOST_FILES = 2**14
_MOST_SEGMENTS = 2**12
_HEADER_BYTES = 2**20
# A line as MetaIO and teem read it, too: no second separator, no bare "\r" and no length at which one of them stops.
_META_LINE = re.compile(rb"(\w[\w|.-]*)[ \t]*=[ \t]*([^\s\0][^\r\n\0]{0,400})(?:\r?\n|\Z)", re.ASCII)
_NRRD_LINE = re.compile(rb"(?:#[^\r\n\0]*|([^\r\n\0:#]+):=?[ \t]*([^\r\n\0]*))(?:\r?\n|\Z)")
_NRRD_MAGIC = re.compile(rb"NRRD\d{4}\r?\n")
_ELSEWHERE = re.compile(rb"ElementDataFile|data\s*file\s*:", re.IGNORECASE)
_NUMBERED = re.compile(r"[^%]*%0?[0-9]{0,2}d[^%]*(\s+-?[0-9]+){3,4}")


def read_itk(path: Path, channel: int | None) -> Volume:
    """An NRRD or MetaImage file; see `volumes.read_volume`."""
    try:
        import SimpleITK as sitk  # noqa: N813 - its own documents write it so
    except ImportError as error:
        raise ConfigError(f"{path}: needs SimpleITK: pip install 'ibisagent[medical]'") from error
    reader = _check_header(path)
    try:
        header = sitk.ImageFileReader()
        header.SetImageIO(reader)  # not any of the twenty others that may like the content
        header.SetFileName(str(path))
        header.ReadImageInformation()
        kind, parts = header.GetPixelID(), header.GetNumberOfComponents()
        vector = "vector" in sitk.GetPixelIDValueAsString(kind)
        one = sitk.GetArrayViewFromImage(sitk.Image([1, 1], kind, 1 if vector else 0))
        limits.check_voxels(header.GetSize(), path, bytes_each=one.dtype.itemsize * parts)
        image = sitk.ReadImage(str(path), imageIO=reader)
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


def read_slicer_segmentation(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The segments of 3D Slicer's `.seg.nrrd` by name, (I, J, K) bool, and their affine.

    Raises DataError for a file that names no segment, and as `read_itk` does.
    """
    _check_header(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        fields, _ = _nrrd_fields(content, path)
    layers: dict[int, Volume] = {}
    masks: dict[str, np.ndarray] = {}
    for number in range(_MOST_SEGMENTS):
        said = {
            part: fields.get(f"segment{number}_{part}".encode(), [default])[0].decode("utf-8", "replace").strip()
            for part, default in (("id", b""), ("name", b""), ("layer", b"0"), ("labelvalue", b"1"))
        }
        if not said["id"]:
            break
        if not (said["layer"].isdigit() and said["labelvalue"].isdigit()):
            raise _misformed(path, f"segment {number} has no label value")
        layer = int(said["layer"])
        if layer not in layers:
            layers[layer] = read_itk(path, layer)
        name = said["name"] or said["id"]
        mask = np.asarray(layers[layer].voxels == int(said["labelvalue"]))
        masks[name if name not in masks else f"{name} ({number + 1})"] = mask
    if not masks:
        raise DataError(f"{path}: names no segment; save it from 3D Slicer as a segmentation")
    return masks, next(iter(layers.values())).affine


def write_nrrd(labels: np.ndarray, volume: Volume, path: Path, *, compressed: bool = True) -> None:
    """Write an (I, J, K) label map of whole numbers as .nrrd on the grid of `volume`, as ITK places it in space.

    Raises ConfigError without SimpleITK, DataError where the disk is full.
    """
    try:
        import SimpleITK as sitk  # noqa: N813
    except ImportError as error:
        raise ConfigError(f"{path.name}: NRRD needs SimpleITK: pip install 'ibisagent[medical]'") from error
    image = sitk.GetImageFromArray(np.ascontiguousarray(labels.swapaxes(0, 2)))
    affine = LPS @ volume.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    with appearing_whole(path, ".nrrd") as part:
        try:
            sitk.WriteImage(image, str(part), useCompression=compressed)
        except RuntimeError as error:
            raise DataError(f"{path}: cannot be written ({one_line(error)}); free space") from error


def _check_header(path: Path) -> str:
    """The name of ITK's reader for the file. DataError for a header that makes ITK open other files, or crash.

    ITK trusts the number of sides, the size of compressed data, and the names of files with voxels, which may lie
    anywhere and are formats of printf. So nothing is let through that it could read in another way than we do.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        nrrd = content[:4] == b"NRRD"
        fields, end = _nrrd_fields(content, path) if nrrd else _meta_fields(content, path)
        for said in fields.get(b"dimension" if nrrd else b"ndims", ()):
            if not (said.isdigit() and 0 < int(said[:9]) <= _MOST_SIDES):
                raise DataError(f"{path}: has {_text(said)} sides, 2 to 4 are read; save a volume of real numbers")
        for said in fields.get(b"compresseddatasize", ()):
            if not (said.isdigit() and int(said[:20]) <= len(content)):
                raise DataError(f"{path}: says that its voxels are {_text(said)} bytes of the file; copy it again")
        named = fields.get(b"datafile" if nrrd else b"elementdatafile", [])
        if len(_ELSEWHERE.findall(content, 0, _HEADER_BYTES)) != len(named):
            raise _misformed(path, "it names files with voxels twice")
        listed = [name for name in named if name.upper().startswith(b"LIST")]
        if listed:
            named = content[end:].split(b"\n", _MOST_FILES + 1)
            if len(named) > _MOST_FILES:
                raise DataError(f"{path}: lists more than {_MOST_FILES} files; save the volume in one")
        for name in named:
            place = name.decode("latin-1").strip().replace("\\", "/")
            if place.startswith("/") or ".." in place.split("/"):
                raise DataError(
                    f"{path}: its voxels are in '{place[-80:]}', outside its folder; put both in one folder"
                )
            if "%" in place and not _NUMBERED.fullmatch(place):
                raise _misformed(path, f"'{place[:80]}' is no name of numbered files")
    return "NrrdImageIO" if nrrd else "MetaImageIO"


def _meta_fields(content: mmap.mmap, path: Path) -> tuple[dict[bytes, list[bytes]], int]:
    """The values of each field of a MetaImage header, names in small letters, and where the header ends."""
    fields: dict[bytes, list[bytes]] = {}
    at = 0
    while b"elementdatafile" not in fields:
        line = _META_LINE.match(content, at, _HEADER_BYTES)
        if line is None:
            raise _misformed(path, f"byte {at} is not the begin of a line 'name = value'")
        fields.setdefault(line[1].lower(), []).append(line[2].strip())
        at = line.end()
    return fields, at


def _nrrd_fields(content: mmap.mmap, path: Path) -> tuple[dict[bytes, list[bytes]], int]:
    """As `_meta_fields`, of an NRRD header: names without spaces, keys as if they were fields."""
    fields: dict[bytes, list[bytes]] = {}
    magic = _NRRD_MAGIC.match(content)
    at = magic.end() if magic else 0
    while at < len(content) and content[at : at + 2].strip(b"\r")[:1] != b"\n":
        line = _NRRD_LINE.match(content, at, _HEADER_BYTES)
        if line is None:
            raise _misformed(path, f"byte {at} is not the begin of a line 'field: value'")
        at = line.end()
        if line[1] is not None:
            name, value = b"".join(line[1].lower().split()), line[2].strip()
            fields.setdefault(name, []).append(value)
            if name == b"datafile" and value.upper().startswith(b"LIST"):  # to the end of the file
                break
    return fields, at


def _misformed(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: its header cannot be trusted ({reason}); save it again")


def _text(said: bytes) -> str:
    return said[:80].decode("latin-1").strip()
