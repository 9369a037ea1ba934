"""Pictures and masks from files and back: PNG, JPEG, TIFF and BMP, any bit depth, any number of channels.

Every file problem is a DataError of one line that names the file and the remedy. Files are written whole or not at all.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import tifffile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ibisagent import limits
from ibisagent.domain import Image, Mask
from ibisagent.errors import ConfigError, DataError, IbisError, TooLargeError
from ibisagent.files import one_line, write_whole
from ibisagent.limits.headers import check_image_file

WINDOW_PERCENTILES = (0.5, 99.5)
MAX_CHANNELS = 16

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # Pillow knows more, some run other programs: not for files of strangers
_VOLUME_SUFFIXES = (".nii", ".nii.gz", ".dcm", ".dicom", ".mha", ".mhd", ".nrrd")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION_TAG, _BITS_TAG = 274, 258  # TIFF 6.0; EXIF has the first too
_warning_filters = threading.Lock()


def read_image(path: str | os.PathLike[str]) -> Image:
    """The picture in a PNG, JPEG, TIFF or BMP file, upright (EXIF/TIFF orientation applied), as 8-bit RGB.

    - 1 channel: grey, repeated three times. 2: the first is grey, the second is taken as alpha. 3: red, green, blue.
      4: red, green, blue and alpha; CMYK is converted. 5 to MAX_CHANNELS: the first three.
    - Alpha is dropped, not blended: the colours below it stay as stored. Palettes are resolved.
    - 8-bit values stay as they are. 16-bit, 32-bit and float values are windowed: the 0.5th to the 99.5th percentile
      of all finite values of all channels goes to 0..255 linearly, what lies outside is clipped; if these two are
      equal, minimum to maximum is taken. NaN becomes 0.
    - What the headers claim is held against `limits` before anything is decoded. Stacks of several images are refused.

    Raises DataError naming the file and the remedy.
    """
    path = Path(path)
    values, _ = _decode(path, as_labels=False)
    shown = _to_uint8(values[..., : 3 if values.shape[2] >= 3 else 1], path)
    return Image(np.ascontiguousarray(shown.repeat(3 // shown.shape[2], axis=2)), source=str(path))


def decode_picture(content: bytes, where: str, formats: tuple[str, ...]) -> PIL.Image.Image:
    """A picture that came over a network, as Pillow decodes it: not turned, windowed or converted.

    where: what the picture is called in errors. formats: names that Pillow has for those that are taken, such as "PNG".
    What the headers claim is held against `limits` before anything is decoded. Raises DataError.
    """
    with _told(where):
        try:
            picture = _open(io.BytesIO(content), where, formats)
        except PIL.UnidentifiedImageError as error:
            raise DataError(f"{where}: not a readable {' or '.join(formats)} picture; send another") from error
        picture.load()
    return picture


def read_masks(path: str | os.PathLike[str], labels: Mapping[int | str, str] | None = None) -> dict[str, Mask]:
    """The masks in an image file, each (H, W) bool, upright as `read_image` gives the picture.

    labels None: the file is one binary mask, black outside and one other value or colour (1, 255, ...) inside; the
    result is {"mask": mask}, all False where the file is black. JPEG does not keep values, so there a brightness of 128
    and above is inside.
    labels {value: name}: the file is a label map. A value is a whole number, also as text ("3"): the grey value, or the
    index in a palette image; 2- and 4-bit grey is scaled to 0..255, as PNG says. Or every value is a colour "#rrggbb".
    Values of one name are joined, values not named are ignored. A named value that does not occur gives an all-False
    mask; but if none occurs in a file that is not empty, the mapping is taken to be wrong.

    Raises DataError naming the file and the remedy, ConfigError for labels that are neither numbers nor colours.
    """
    path = Path(path)
    if labels is None:
        return {"mask": _binary_mask(path)}
    codes_of, coloured = _label_codes(labels)
    values, lossy = _decode(path, as_labels=not coloured)
    if lossy:
        raise DataError(f"{path}: JPEG does not keep label values; save the mask as PNG")
    codes = _colour_codes(values, path) if coloured else _number_codes(values, path)
    masks = {name: np.isin(codes, wanted) for name, wanted in codes_of.items()}
    if codes.any() and not any(mask.any() for mask in masks.values()):
        given = ", ".join(str(value) for value in labels)[:80]
        raise DataError(f"{path}: labels {given} do not occur, it holds {_listed(codes, coloured)}; correct the labels")
    return masks


def write_mask_png(mask: Mask, path: str | os.PathLike[str]) -> None:
    """Write a (H, W) bool mask as an 8-bit grey PNG, 0 outside and 255 inside; see `write_png`."""
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise DataError(f"{path}: a mask is (H, W) bool, got {mask.shape} {mask.dtype}")
    write_png(mask.astype(np.uint8) * 255, path)


def write_png(picture: PIL.Image.Image | np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) uint8 or (H, W) uint16, as PNG.

    The file appears complete, by rename, or not at all; an older file of that name stays until then. Raises DataError
    when the folder does not exist or cannot be written, or the disk is full.
    """
    if isinstance(picture, np.ndarray):
        kind = (picture.dtype.name, picture.shape[2:])
        if kind not in (("uint8", ()), ("uint8", (3,)), ("uint8", (4,)), ("uint16", ())) or 0 in picture.shape:
            raise DataError(f"{path}: cannot write {picture.shape} {picture.dtype} as PNG; see write_png")
        picture = PIL.Image.fromarray(np.ascontiguousarray(picture))
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    write_whole(encoded.getvalue(), path)


def _decode(path: Path, *, as_labels: bool) -> tuple[np.ndarray, bool]:
    """Stored values (H, W, C), upright, and whether the format is lossy (JPEG).

    as_labels: palettes stay indices and 1-bit files are 0/1; otherwise palettes become RGBA and 1-bit files 0/255.
    """
    _check_readable(path)
    with _told(path):
        try:
            with path.open("rb") as file, _open(file, path, _FORMATS) as picture:
                lossy = picture.format in ("JPEG", "MPO")
                values = _decode_open(picture, path, as_labels=as_labels)
        except PIL.UnidentifiedImageError as error:
            with path.open("rb") as file:
                known = file.read(4) in _TIFF_MAGIC
            if not known:
                raise DataError(
                    f"{path}: not a readable PNG, JPEG, TIFF or BMP picture; export it again as PNG"
                ) from error
            lossy, values = False, _decode_tiff(path)
    return (values if values.ndim == 3 else values[..., None]), lossy


def _check_readable(path: Path) -> None:
    if path.name.lower().endswith(_VOLUME_SUFFIXES):
        raise DataError(
            f"{path}: is a volume, not a picture; read it with volumes.read_volume, or export the slice as PNG"
        )
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name an image file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes); export or copy it again")
        path.open("rb").close()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"{str(path)[:200]!r}: cannot be read ({error}); check name and rights") from error


@contextmanager
def _told(where: object) -> Iterator[None]:
    """Whatever a decoder raises, as a DataError in one line."""
    try:
        yield
    except IbisError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        # no TooLargeError: Pillow takes it for an attack, and servers answer as they do to damage
        claimed = re.search(r"[0-9]+", str(error))
        most = limits.current().pixels
        raise DataError(
            f"{where}: {claimed[0] if claimed else 'too many'} pixels, at most {most} are read; crop or shrink it"
            f"{limits.or_raise('pixels')}"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere inside the decoders
        if "MAX_TEXT" in str(error):  # Pillow's limits, of 1 MB for one text or profile and 64 MB for all
            raise TooLargeError(f"{where}: a text or profile in it unpacks to too much; save it without") from error
        raise _damaged(where, error) from error


def _open(file: IO[bytes], where: object, formats: tuple[str, ...]) -> ImageFile:
    """Headers only, held against the limits.

    Pillow warns about large pictures before their size can be asked for, so the warning is an error.
    """
    check_image_file(file, where)
    file.seek(0)
    if PIL.Image.MAX_IMAGE_PIXELS is not None:  # who raises our limit means Pillow's as well
        PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, limits.current().pixels)
    with _warning_filters, warnings.catch_warnings():  # the filters belong to the whole process
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        picture = PIL.Image.open(file, formats=formats)
    _check_size(where, picture.height, picture.width, len(picture.getbands()), 1)
    return picture


def _check_size(where: object, height: int, width: int, channels: int, bytes_each: int) -> None:
    """bytes_each: of one value of one channel."""
    if height < 1 or width < 1 or channels < 1:
        raise DataError(f"{where}: has no pixels ({width} x {height}); export it again")
    if channels > MAX_CHANNELS:
        raise DataError(
            f"{where}: has {channels} channels, at most {MAX_CHANNELS} are read; save those that are needed"
        )
    limits.check_pixels(height, width, where, bytes_each=channels * bytes_each)


def _damaged(where: object, error: Exception) -> DataError:
    return DataError(f"{where}: damaged, cut off or of an unknown kind ({one_line(error)}); export or copy it again")


def _is_series(picture: ImageFile) -> bool:
    """Whether a second page is as large as the first: channels or a volume, where a smaller one is a thumbnail."""
    first = picture.size
    try:
        picture.seek(1)  # not n_frames, which reads all pages
    except EOFError:
        return False
    second = picture.size
    picture.seek(0)
    return first == second


def _decode_open(picture: ImageFile, path: Path, *, as_labels: bool) -> np.ndarray:
    """Values of an opened picture; those that Pillow would cut to 8 bits per channel are decoded elsewhere."""
    if picture.format == "TIFF" and (_is_deep(picture) or _is_series(picture)):
        return _decode_tiff(path)
    if _is_deep(picture):
        picture.load()  # OpenCV returns what it has when a file is cut off, Pillow complains
        values = cv2.imdecode(np.frombuffer(path.read_bytes(), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise DataError(f"{path}: cannot be decoded; export it again")
        order = [2, 1, 0, 3][: values.shape[2]]  # OpenCV gives blue first
        return _upright(values[..., order], picture.getexif().get(_ORIENTATION_TAG, 1))
    upright = PIL.ImageOps.exif_transpose(picture)
    if upright.mode == "1":
        return np.array(upright, dtype=np.uint8) * (1 if as_labels else 255)
    if upright.mode in ("P", "PA") and not as_labels:
        upright = upright.convert("RGBA")  # not RGB: Pillow warns about palettes with transparency
    elif upright.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBa", "La"):
        upright = upright.convert("RGB")
    return np.array(upright)


def _is_deep(picture: ImageFile) -> bool:
    """Whether the file holds more than 8 bits in each of several channels, which Pillow would cut to 8."""
    if picture.mode not in ("RGB", "RGBA", "RGBX", "LA"):
        return False
    if isinstance(picture, TiffImageFile):
        return bool(max(picture.tag_v2.get(_BITS_TAG, (8,))) > 8)
    return "16" in str(picture.tile)  # the raw mode, as in "RGB;16B"


def _decode_tiff(path: Path) -> np.ndarray:
    """Values (H, W, C) of a TIFF that Pillow cannot hold: many channels, or more than 8 bits in each of several."""
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            sides = dict(zip(series.axes, series.shape, strict=True))  # letters as tifffile names axes
            height, width = sides.pop("Y"), sides.pop("X")
            channel_axis = "S" if sides.get("S", 1) > 1 else "C"
            channels = sides.pop(channel_axis, 1)
            if any(side > 1 for side in sides.values()):
                raise DataError(
                    f"{path}: is a stack (axes {series.axes}); save the picture to read as a file of its own"
                )
            _check_size(path, height, width, channels, series.dtype.itemsize)
            orientation = int(file.pages.first.tags.valueof(_ORIENTATION_TAG, default=1))
            values = tifffile.transpose_axes(series.asarray(), series.axes, asaxes=f"ZYX{channel_axis}")
    except IbisError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside the decoder
        raise _damaged(path, error) from error
    return _upright(values.reshape(height, width, channels), orientation)


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Undo a camera's EXIF orientation (1 to 8; TIFF 6.0, tag 274) of (H, W, ...) values; others count as 1."""
    if orientation in (5, 6, 7, 8):  # stored with rows and columns exchanged
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def _to_uint8(values: np.ndarray, path: Path) -> np.ndarray:
    """8-bit values as they are, others windowed by WINDOW_PERCENTILES."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "buif":
        raise DataError(f"{path}: holds {values.dtype} values; save it with whole or real numbers")
    if values.dtype.kind in "iu" and values.dtype.itemsize == 2:
        return _table_to_uint8(values)
    values = values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise DataError(f"{path}: holds no finite value; export it again")
    low, high = np.percentile(finite, WINDOW_PERCENTILES)
    if low == high:
        low, high = finite.min(), finite.max()
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low).clip(low, high) - low) / (high - low or 1)
    windowed: np.ndarray = np.rint(scaled * 255).astype(np.uint8)
    return windowed


def _table_to_uint8(values: np.ndarray) -> np.ndarray:
    """16-bit values windowed, by a table of all of them: as exact, and without copies of the image as real numbers."""
    first = np.iinfo(values.dtype).min
    codes = values.view(np.uint16) ^ np.uint16(-first)  # in the order of the values
    blocks = np.array_split(codes, -(-codes.size // 2**20))  # NumPy counts them as 64-bit numbers
    ends = np.cumsum(sum(np.bincount(block.reshape(-1), minlength=2**16) for block in blocks))
    bounds = []
    for percentile in WINDOW_PERCENTILES:
        place = percentile / 100 * (values.size - 1)
        below, above = (int(np.searchsorted(ends, rank, side="right")) for rank in (int(place), math.ceil(place)))
        bounds.append(first + below + (above - below) * (place - int(place)))
    low, high = bounds
    if low == high:
        shown = np.flatnonzero(np.diff(ends, prepend=0))
        low, high = first + float(shown[0]), first + float(shown[-1])
    every = np.arange(first, first + 2**16, dtype=np.float64)
    table = np.rint((every.clip(low, high) - low) / (high - low or 1) * 255).astype(np.uint8)
    windowed: np.ndarray = table[codes]
    return windowed


def _binary_mask(path: Path) -> Mask:
    values, lossy = _decode(path, as_labels=False)
    if lossy:
        mask: Mask = values.mean(axis=2) >= 128
        return mask
    codes = _number_codes(values, path) if values.shape[2] < 3 else _colour_codes(values, path)
    if len(np.unique(codes[codes != 0])) > 1:
        held = _listed(codes, coloured=values.shape[2] >= 3)
        raise DataError(f"{path}: is not binary, it holds {held}; say which object each value is (labels)")
    return np.asarray(codes != 0)


def _label_codes(labels: Mapping[int | str, str]) -> tuple[dict[str, list[int]], bool]:
    """The codes of each name, and whether they are colours (0xRRGGBB) rather than numbers."""
    coloured = {isinstance(value, str) and value.strip().startswith("#") for value in labels}
    if len(coloured) != 1:
        raise ConfigError("labels must map values to names, either all numbers {1: 'liver'} or all colours '#ff0000'")
    codes: dict[str, list[int]] = {}
    for value, name in labels.items():
        text = str(value).strip()
        pattern, base = (r"#[0-9a-fA-F]{6}", 16) if coloured == {True} else (r"-?[0-9]{1,9}", 10)
        if not re.fullmatch(pattern, text):
            raise ConfigError(f"label {text[:40]!r} is neither a whole number nor a colour such as '#ff0000'")
        codes.setdefault(name, []).append(int(text.removeprefix("#"), base))
    return codes, coloured == {True}


def _number_codes(values: np.ndarray, path: Path) -> np.ndarray:
    """The label number of each pixel, (H, W) int64, of a grey file, also one saved with equal colour channels."""
    channels = values[..., :3] if values.shape[2] >= 3 else values[..., :1]
    if channels.dtype.kind == "f" and not (np.isfinite(channels) & (np.rint(channels) == channels)).all():
        raise DataError(f"{path}: holds fractions, a mask holds whole numbers; save it as 8- or 16-bit PNG")
    if values.shape[2] > 4 or (channels != channels[..., :1]).any():
        raise DataError(f"{path}: is coloured, not a map of label numbers; name its colours ('#rrggbb') in the labels")
    return channels[..., 0].astype(np.int64)


def _colour_codes(values: np.ndarray, path: Path) -> np.ndarray:
    """The colour of each pixel as 0xRRGGBB, (H, W) int64; grey counts as that colour."""
    if values.dtype != np.uint8 or values.shape[2] > 4:
        raise DataError(f"{path}: is not an 8-bit colour picture; save the mask as 8-bit PNG")
    red, green, blue = (values[..., channel if values.shape[2] >= 3 else 0].astype(np.int64) for channel in range(3))
    return red << 16 | green << 8 | blue


def _listed(codes: np.ndarray, coloured: bool) -> str:
    """The values of a label map in words, at most eight of them."""
    values = np.unique(codes)
    shown = ", ".join(f"#{value:06x}" if coloured else str(value) for value in values[:8])
    return f"{len(values)} values ({shown}{', ...' if len(values) > 8 else ''})"
