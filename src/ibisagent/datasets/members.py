"""Images and masks by their address: a file, or a file and what to take out of it.

Some data sets keep many images in one file. Their rows name them by a path that goes on beyond the file:

| path | what |
|---|---|
| `kvasir_256.npz/test_images/12` | entry 12 of that array; (N, H, W) or (N, H, W, 3) |
| `imagesTr/heart_3.nii.gz/axial/57` | that slice, as `volumes.SliceView` shows it |
| `instances_val.json/139/17` | in COCO's JSON all instances of category 17 in image 139, as one mask |
| `masks/name--0003_000+001.png` | the union of `..._000.png` and `..._001.png` beside each other |
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from pycocotools import mask as coco

from ibisagent.domain import Image, Mask
from ibisagent.errors import DataError, TooLargeError
from ibisagent.files import FileHashes
from ibisagent.imaging import limits
from ibisagent.imaging.images import read_image, read_masks
from ibisagent.imaging.masks import decode_runs
from ibisagent.volumes import SliceView, Volume, read_volume
from ibisagent.volumes.grid import scratch

ARRAYS, VOLUMES, COCO = ".npz", (".nii", ".nii.gz"), ".json"
_CHUNK = 2**22
_HEADER_BYTES = 10_000  # of an .npy file, as NumPy limits it
_MOST_ARRAYS = 1_000
_MOST_STEPS = 2**22
"""How many pixels long the outline of one polygon may be: it is drawn step by step, five to a pixel."""


def read_image_at(path: Path) -> Image:
    """The image at an address. DataError naming the file and the remedy."""
    file, inside = _container(path)
    if file is None:
        return read_image(path)
    if file.name.lower().endswith(VOLUMES):
        axis, index = _slice_address(path, inside)
        return _view(file, axis).image(index)
    if file.suffix.lower() == ARRAYS:
        values = _entry(path, file, inside)
        if values.dtype != np.uint8 or values.shape[2:] not in ((), (1,), (3,)):
            raise DataError(f"{path}: is {values.shape} {values.dtype}, an image is (H, W) or (H, W, 3) uint8")
        grey = values.ndim == 2 or values.shape[2] == 1
        pixels = values.reshape(*values.shape[:2], -1).repeat(3, axis=2) if grey else values
        return Image(np.ascontiguousarray(pixels), source=str(path))
    raise DataError(f"{path}: there are no images in {file.name}; correct the row")


def read_target(path: Path, label: int | str | None) -> Mask:
    """The mask at an address, (H, W) bool. label: its value in a label map, None where the file is one binary mask."""
    file, inside = _container(path)
    if file is None:
        if len(parts := _parts(path)) > 1:
            return _union(path, parts)
        return next(iter(read_masks(path, None if label is None else {label: "mask"}).values()))
    if file.suffix.lower() == COCO:
        return _instances(path, file, inside)
    if file.name.lower().endswith(VOLUMES):
        axis, index = _slice_address(path, inside)
        return _view(file, axis).read_mask(_label(file, label), index)
    values = _entry(path, file, inside)
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2:
        raise DataError(f"{path}: is {values.shape}, a mask is (H, W)")
    mask: Mask = values != 0 if label is None else values == label
    return mask


def content_of(path: Path, hashes: FileHashes) -> str:
    """What is at an address, as hashes: it changes if and only if the file does, or what the file says of the address.

    An annotation of COCO's JSON stands for itself, so that a correction of one changes no other.
    """
    file, inside = _container(path)
    if file is None:
        return " ".join(hashes.of(part) for part in _parts(path))
    if file.suffix.lower() != COCO:
        return hashes.of(file)
    images, parts = coco_index(file)
    image, category = (int(part) for part in inside)
    said = json.dumps([images.get(image), parts.get((image, category))], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def npz_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every array in a NumPy archive, from the headers alone. DataError if it is none."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = {}
            names = archive.namelist()
            if len(names) > _MOST_ARRAYS:
                raise ValueError(f"it holds {len(names)} files, at most {_MOST_ARRAYS} are read")
            for name in names:
                with archive.open(name) as entry:
                    found[name.removesuffix(".npy")] = _header(entry)[0]
            return found
    except (OSError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: is no NumPy archive ({error}); download it again") from error


def npz_array(file: Path, key: str) -> np.ndarray:
    """One array of a NumPy archive; a large one is unpacked into an unnamed temporary file. DataError as above."""
    return _array(file, key, file.stat().st_mtime_ns)


def read_json(file: Path) -> Any:
    """What a JSON file holds; the newest two are remembered. DataError if it cannot be read."""
    try:
        return _json(file, file.stat().st_mtime_ns)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON ({error}); download it again") from error


def _container(path: Path) -> tuple[Path | None, tuple[str, ...]]:
    """(the file that the image is in, the rest of the path); (None, ()) for an image that is a file itself."""
    for depth, parent in enumerate(path.parents, start=1):
        if parent.name.lower().endswith((ARRAYS, COCO, *VOLUMES)) and parent.is_file():
            return parent, path.parts[-depth:]
    return None, ()


def _parts(path: Path) -> list[Path]:
    """The files of a mask: `path`, or those whose union it names."""
    start, _, numbers = path.stem.rpartition("_")
    if "+" not in numbers or path.exists():
        return [path]
    return [path.with_name(f"{start}_{number}{path.suffix}") for number in numbers.split("+")]


def _union(path: Path, parts: Sequence[Path]) -> Mask:
    masks = [next(iter(read_masks(part).values())) for part in parts]
    if len({mask.shape for mask in masks}) > 1:
        raise DataError(f"{path}: its parts are of different size; download them again")
    merged: Mask = np.any(masks, axis=0)
    return merged


def _slice_address(path: Path, inside: tuple[str, ...]) -> tuple[str, int]:
    if len(inside) != 2 or not inside[1].isdecimal():
        raise DataError(f"{path}: says no slice; write FILE/axial/57")
    return inside[0], int(inside[1])


def _view(file: Path, axis: str) -> SliceView:
    return SliceView(_volume(file, file.stat().st_mtime_ns), axis)


@lru_cache(maxsize=2)  # the volume and its labels: slices of one volume follow each other
def _volume(file: Path, _changed: int) -> Volume:
    return read_volume(file, channel=0)


def _label(file: Path, label: int | str | None) -> np.ndarray:
    return _label_volume(file, file.stat().st_mtime_ns, label)


@lru_cache(maxsize=1)
def _label_volume(file: Path, changed: int, label: int | str | None) -> np.ndarray:
    voxels = _volume(file, changed).voxels
    chosen: np.ndarray = voxels != 0 if label is None else voxels == label
    return chosen


def _entry(path: Path, file: Path, inside: tuple[str, ...]) -> np.ndarray:
    if len(inside) != 2 or not inside[1].isdecimal():
        raise DataError(f"{path}: says no entry; write FILE/test_images/12")
    array = npz_array(file, inside[0])
    index = int(inside[1])
    if index >= len(array):
        raise DataError(f"{path}: '{inside[0]}' has entries 0 to {len(array) - 1}")
    return cast(np.ndarray, array[index])


@lru_cache(maxsize=4)
def _array(file: Path, key: str, _changed: int) -> np.ndarray:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as entry:
            shape, fortran, dtype = _header(entry)
            limits.check_unpacked(math.prod(shape) * dtype.itemsize, f"{file}: '{key}'")
            flat = scratch((math.prod(shape),), dtype)
            raw, at = flat.view(np.uint8), 0
            while chunk := entry.read(_CHUNK):
                raw[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
                at += len(chunk)
            if at != raw.size:
                raise ValueError("cut off")
    except TooLargeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: '{key}' cannot be read ({error}); download it again") from error
    return flat.reshape(shape, order="F" if fortran else "C")


def _header(entry: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether column-major, type) of an .npy stream. ValueError for what is none, or holds objects."""
    version = np.lib.format.read_magic(entry)
    first = version == (1, 0)
    length = entry.read(2 if first else 4)
    if int.from_bytes(length, "little") > _HEADER_BYTES:
        raise ValueError("its header is too long")
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(io.BytesIO(length + entry.read(int.from_bytes(length, "little"))))
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read")
    return shape, fortran, dtype


@lru_cache(maxsize=2)
def _json(file: Path, _changed: int) -> Any:
    return json.loads(file.read_bytes())


def coco_index(file: Path) -> tuple[dict[int, Any], dict[tuple[int, int], list[Any]]]:
    """({image id: image}, {(image id, category id): annotations}) of COCO's JSON. DataError for another structure."""
    return _coco_index(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _coco_index(file: Path, _changed: int) -> tuple[dict[int, Any], dict[tuple[int, int], list[Any]]]:
    loaded = read_json(file)
    try:
        images = {int(image["id"]): image for image in loaded["images"]}
        parts: dict[tuple[int, int], list[Any]] = {}
        for annotation in loaded["annotations"]:
            parts.setdefault((int(annotation["image_id"]), int(annotation["category_id"])), []).append(annotation)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: is not COCO's instance JSON ({error!r}); see docs/reference/datasets.md") from error
    return images, parts


def _instances(path: Path, file: Path, inside: tuple[str, ...]) -> Mask:
    images, parts = coco_index(file)
    try:
        image_id, category = (int(part) for part in inside)
        image, annotations = images[image_id], parts[image_id, category]
        height, width = int(image["height"]), int(image["width"])
        if height < 1 or width < 1:
            raise ValueError(f"image of {width} x {height}")
        limits.check_pixels(height, width, path)
        merged = np.zeros((height, width), dtype=bool)
        for annotation in annotations:
            merged |= _instance(annotation["segmentation"], height, width)
    except TooLargeError:
        raise
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{path}: cannot be drawn ({error!r}); correct the annotation") from error
    return merged


def _instance(shape: Any, height: int, width: int) -> Mask:
    """One instance: polygons, or run lengths, plain or compressed (COCO API format)."""
    if isinstance(shape, list):
        if not shape:
            raise ValueError("it has no polygon")
        corners = [_checked_polygon(polygon, height, width) for polygon in shape]
        drawn: Mask = coco.decode(coco.merge(coco.frPyObjects(corners, height, width))).astype(bool)
        return drawn
    if list(shape["size"]) != [height, width]:
        raise ValueError(f"run-length mask of size {str(shape['size'])[:40]}")
    return decode_runs(shape)


def _checked_polygon(polygon: Any, height: int, width: int) -> list[float]:
    """x and y by turns. ValueError for what pycocotools trusts: no numbers, corners far outside, endless outlines."""
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon has three corners or more, x and y of each")
    corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    sides = np.array([width, height], dtype=np.float64)
    if not ((corners >= -sides) & (corners <= 2 * sides)).all():
        raise ValueError(f"a polygon leaves the image of {width} x {height} by more than its size")
    steps = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum()
    if steps > _MOST_STEPS:
        raise ValueError(f"a polygon has an outline of {steps:.0f} pixels, at most {_MOST_STEPS} are drawn")
    numbers: list[float] = corners.reshape(-1).tolist()
    return numbers
