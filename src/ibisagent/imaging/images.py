"""Images and masks from files and back: PNG, JPEG, TIFF and BMP, any bit depth, any number of channels.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import tifffile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ibisagent.domain import Image, Mask
from ibisagent.errors import ConfigError, DataError, IbisError, TooLargeError
from ibisagent.files import one_line, write_whole
from ibisagent.imaging import limits
from ibisagent.imaging.limits.headers import check_image_file

WINDOW_PERCENTILES = (0.5, 99.5)
MAX_CHANNELS = 16

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # Pillow knows more, some run other programs: not for files of strangers
_VOLUME_SUFFIXES = (".nii", ".nii.gz", ".dcm", ".dicom", ".mha", ".mhd", ".nrrd")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last: large, big-endian
_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG, _SOFTWARE_TAG = 274, 258, 262, 305
_SAMPLES_TAG, _PLANES_TAG, _EXTRA_TAG, _SAMPLE_FORMAT_TAG = 277, 284, 338, 339
"""TIFF 6.0; EXIF has the first too."""
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # of the tag PhotometricInterpretation
_SEPARATE = 2  # of the tag PlanarConfiguration
_ASSOCIATED = 1
_ALPHA_KINDS = (2, _ASSOCIATED)  # of the tag ExtraSamples; 2: unassociated, 0 says nothing
_COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 50000)
"""None, LZW, Deflate (two numbers), PackBits, LZMA, Zstandard: no stream in them states a size of its own."""
_DARKEST_MASK = 32
"""A mask in a JPEG is at least so bright: noise of strong compression is not."""
_JPEG_BORDER = 9  # pixels: a block of the transform is 8 wide
_MOST_BETWEEN = 0.01
_warning_filters = threading.Lock()


def read_image(path: str | os.PathLike[str]) -> Image:
    """The image in a PNG, JPEG, TIFF or BMP file, upright (EXIF/TIFF orientation applied), as 8-bit RGB.

    - 1 channel: grey, repeated three times. 2: shown in red and green, as of two stains. 3: red, green, blue. CMYK is
      converted. 4 and more are refused: which three to show is for the user to say.
    - Alpha is dropped, not blended: the colours below it stay as stored. Palettes are resolved. In a TIFF the tag
      ExtraSamples says which channel is alpha; a fourth one beside red, green and blue of which it says nothing is.
    - Polarity, sign and byte order are those that the file states. A TIFF of one bit that tifffile wrote is as its
      array was: it tags all of them "white is zero" and means True is 1.
    - 8-bit values stay as they are. 16-bit, 32-bit and float values are windowed: the 0.5th to the 99.5th percentile
      of all finite values of all channels goes to 0..255 linearly, what lies outside is clipped; if these two are
      equal, minimum to maximum is taken. NaN becomes 0.
    - What the headers claim is held against `limits` before anything is decoded. Stacks of multiple images are refused.

    Raises DataError naming the file and the remedy.
    """
    path = Path(path)
    values = _decode(path, as_labels=False).values
    channels = values.shape[2]
    if channels > 3:
        raise DataError(f"{path}: has {channels} channels, an image to read has 1 to 3; save those to look at")
    shown = _to_uint8(values, path)
    if channels == 2:
        shown = np.dstack([shown, np.zeros_like(shown[..., :1])])
    return Image(np.ascontiguousarray(shown.repeat(3 // shown.shape[2], axis=2)), source=str(path))


def decode_image(content: bytes, where: str, formats: tuple[str, ...]) -> PIL.Image.Image:
    """An image that came over a network, as Pillow decodes it: not turned, windowed or converted.

    where: what the image is called in errors. formats: names that Pillow has for those that are taken, such as "PNG".
    What the headers claim is held against `limits` before anything is decoded. Raises DataError.
    """
    with _told(where):
        try:
            image = _open(io.BytesIO(content), where, formats)
        except PIL.UnidentifiedImageError as error:
            raise DataError(f"{where}: not a readable {' or '.join(formats)} image; send another") from error
        image.load()
    return image


def read_masks(path: str | os.PathLike[str], labels: Mapping[int | str, str] | None = None) -> dict[str, Mask]:
    """The masks in an image file, each (H, W) bool, upright as `read_image` gives the image.

    labels None: the file is one binary mask, black outside and one other value or colour (1, 255, ...) inside; the
    result is {"mask": mask}, all False where the file is black. Where alpha varies and what is not transparent has one
    colour, alpha is the mask. JPEG does not keep values, so there half of the largest value divides inside from
    outside; a file that is almost black, or has values between away from the border of the mask, is refused.
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
    stored = _decode(path, as_labels=not coloured)
    if stored.lossy:
        raise DataError(f"{path}: JPEG does not keep label values; save the mask as PNG")
    codes = _colour_codes(stored.values, path) if coloured else _number_codes(stored.values, path)
    if stored.alpha is not None and stored.alpha.any():
        codes = np.where(stored.alpha == 0, 0, codes)  # what is not seen is no label
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


def write_png(image: PIL.Image.Image | np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) uint8 or (H, W) uint16, as PNG.

    The file appears complete, by rename, or not at all; an older file of that name stays until then. Raises DataError
    when the folder does not exist or cannot be written, or the disk is full.
    """
    if isinstance(image, np.ndarray):
        kind = (image.dtype.name, image.shape[2:])
        if kind not in (("uint8", ()), ("uint8", (3,)), ("uint8", (4,)), ("uint16", ())) or 0 in image.shape:
            raise DataError(f"{path}: cannot write {image.shape} {image.dtype} as PNG; see write_png")
        image = PIL.Image.fromarray(np.ascontiguousarray(image))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    write_whole(encoded.getvalue(), path)


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a file holds, upright. values: (H, W, C) without alpha; alpha: (H, W); lossy: whether it is JPEG."""

    values: np.ndarray
    alpha: np.ndarray | None = None
    lossy: bool = False


def _decode(path: Path, *, as_labels: bool) -> _Stored:
    """as_labels: palettes stay indices and 1-bit files are 0/1; otherwise palettes become colours and 1-bit 0/255."""
    _check_readable(path)
    with _told(path):
        try:
            with path.open("rb") as file, _open(file, path, _FORMATS) as image:
                stored = _decode_open(image, path, as_labels=as_labels)
        except PIL.UnidentifiedImageError as error:
            with path.open("rb") as file:
                known = file.read(4) in _TIFF_MAGIC
            if not known:
                raise DataError(
                    f"{path}: not a readable PNG, JPEG, TIFF or BMP image; export it again as PNG"
                ) from error
            stored = _decode_tiff(path)
    values = stored.values.astype(stored.values.dtype.newbyteorder("="), copy=False)
    return replace(stored, values=values if values.ndim == 3 else values[..., None])


def _check_readable(path: Path) -> None:
    if path.name.lower().endswith(_VOLUME_SUFFIXES):
        raise DataError(
            f"{path}: is a volume, not an image; read it with volumes.read_volume, or export the slice as PNG"
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

    Pillow warns about large images before their size can be asked for, so the warning is an error. Not by its path:
    Pillow maps such a file into memory and loses the rows of a TIFF that lies on its side.
    """
    check_image_file(file, where)
    file.seek(0)
    if file.read(4) == _TIFF_MAGIC[-1]:  # Pillow cannot read it, and warns of damage
        raise PIL.UnidentifiedImageError
    file.seek(0)
    if PIL.Image.MAX_IMAGE_PIXELS is not None:  # who raises our limit means Pillow's as well
        PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, limits.current().pixels)
    with _warning_filters, warnings.catch_warnings():  # the filters belong to the whole process
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        image = PIL.Image.open(file, formats=formats)
    _check_size(where, image.height, image.width, len(image.getbands()), 1)
    return image


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


def _is_series(image: ImageFile) -> bool:
    """Whether a second page is as large as the first: channels or a volume, where a smaller one is a thumbnail."""
    first = image.size
    try:
        image.seek(1)  # not n_frames, which reads all pages
    except EOFError:
        return False
    second = image.size
    image.seek(0)
    return first == second


def _decode_open(image: ImageFile, path: Path, *, as_labels: bool) -> _Stored:
    """Values of an opened image; those that Pillow would cut, wrap or take for others are decoded elsewhere."""
    if isinstance(image, TiffImageFile) and (_is_deep(image) or _is_misread_by_pillow(image) or _is_series(image)):
        return _decode_tiff(path)
    if _is_deep(image):
        image.load()  # OpenCV returns what it has when a file is cut off, Pillow complains
        values = cv2.imdecode(np.frombuffer(path.read_bytes(), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise DataError(f"{path}: cannot be decoded; export it again")
        order = [2, 1, 0, 3][: values.shape[2]]  # OpenCV gives blue first
        return _without_alpha(_upright(values[..., order], image.getexif().get(_ORIENTATION_TAG, 1)))
    lossy = image.format in ("JPEG", "MPO")
    bits_as_stored = image.mode == "1" and isinstance(image, TiffImageFile) and _is_by_tifffile(image)
    upright = PIL.ImageOps.exif_transpose(image)
    if upright.mode in ("P", "PA") and not as_labels:
        upright = upright.convert("RGBA")  # not RGB: Pillow warns about palettes with transparency
    elif upright.mode in ("1", "L", "RGB") and "transparency" in upright.info and not as_labels:
        upright = upright.convert("RGBA" if upright.mode == "RGB" else "LA")
    elif upright.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        upright = upright.convert("RGB")
    if upright.mode == "1":
        return _Stored((np.array(upright) ^ bits_as_stored).astype(np.uint8) * (1 if as_labels else 255))
    values = np.array(upright)
    return _Stored(values, lossy=lossy) if values.ndim == 2 else replace(_without_alpha(values), lossy=lossy)


def _without_alpha(values: np.ndarray) -> _Stored:
    """Grey or colours, and the alpha that comes after them where there are two or four channels."""
    if values.shape[2] in (2, 4):
        return _Stored(values[..., :-1], values[..., -1])
    return _Stored(values)


def _is_deep(image: ImageFile) -> bool:
    """Whether the file holds more than 8 bits in each of multiple channels, which Pillow would cut to 8."""
    if image.mode not in ("RGB", "RGBA", "RGBX", "LA"):
        return False
    if isinstance(image, TiffImageFile):
        return bool(max(image.tag_v2.get(_BITS_TAG, (8,))) > 8)
    return "16" in str(image.tile)  # the raw mode, as in "RGB;16B"


def _is_misread_by_pillow(image: TiffImageFile) -> bool:
    """Whether it is grey with sign, of 32 bits, or deep with white at zero, or has two channels or channels beyond
    alpha, or alpha in a plane of its own, or colours that alpha has been multiplied into.

    Pillow wraps some of these, swaps bytes of others where they are compressed, divides colours by alpha, loses planes,
    takes a second stain for alpha in some of its versions, and ignores the rest.
    """
    tags = image.tag_v2
    bits, kind = max(tags.get(_BITS_TAG, (1,))), tags.get(_SAMPLE_FORMAT_TAG, (1,))[0]
    samples, is_planar = tags.get(_SAMPLES_TAG, 1), tags.get(_PLANES_TAG) == _SEPARATE
    if samples > 4 or samples == 2 or (samples == 4 and (is_planar or _ASSOCIATED in tags.get(_EXTRA_TAG, ()))):
        return True
    if tags.get(_PHOTOMETRIC_TAG) not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
        return False
    return bool(kind != 1 or bits > 16 or (bits > 8 and tags[_PHOTOMETRIC_TAG] == _WHITE_IS_ZERO))


def _is_by_tifffile(image: TiffImageFile) -> bool:
    """Whether tifffile wrote it with white at zero, as it does with all of one bit."""
    tags = image.tag_v2
    return tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO and str(tags.get(_SOFTWARE_TAG, "")).startswith("tifffile")


def _decode_tiff(path: Path) -> _Stored:
    """What a TIFF holds that Pillow cannot hold: many channels, more than 8 bits in each, rare kinds."""
    try:
        with tifffile.TiffFile(path) as file:
            series, page = file.series[0], file.pages.first
            sides = dict(zip(series.axes, series.shape, strict=True))  # letters as tifffile names axes
            height, width = sides.pop("Y"), sides.pop("X")
            channel_axis = "S" if sides.get("S", 1) > 1 else "C"
            channels = sides.pop(channel_axis, 1)
            if any(side > 1 for side in sides.values()):
                raise DataError(f"{path}: is a stack (axes {series.axes}); save the image to read as a file of its own")
            _check_size(path, height, width, channels, series.dtype.itemsize)
            if page.compression not in _COMPRESSIONS:
                name = getattr(page.compression, "name", page.compression)
                raise DataError(f"{path}: {name} compression of such values is not read; save it with LZW or without")
            photometric = int(page.photometric)
            if photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
                name = getattr(page.photometric, "name", photometric)
                raise DataError(f"{path}: holds {channels} channels of kind {name}; save it as grey or RGB")
            orientation = int(page.tags.valueof(_ORIENTATION_TAG, default=1))
            values = tifffile.transpose_axes(series.asarray(), series.axes, asaxes=f"ZYX{channel_axis}")
            extra = [int(kind) for kind in page.extrasamples] if channel_axis == "S" else []
            bits = page.bitspersample
    except IbisError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside the decoder
        if "imagecodecs" in str(error):
            raise DataError(
                f"{path}: its compression needs imagecodecs; install it (pip install imagecodecs)"
            ) from error
        raise _damaged(path, error) from error
    values = _upright(values.reshape(height, width, channels), orientation)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif photometric == _WHITE_IS_ZERO:
        values = _inverted(values, bits)
    if photometric == _RGB and channels == 4 and channel_axis == "S" and extra in ([], [0]):
        extra = [_ALPHA_KINDS[0]]
    alphas = [channels - len(extra) + at for at, kind in enumerate(extra) if kind in _ALPHA_KINDS]
    if not alphas:
        return _Stored(values)
    kept = [channel for channel in range(channels) if channel not in alphas]
    return _Stored(values[..., kept], values[..., alphas[0]])


def _inverted(values: np.ndarray, bits: int) -> np.ndarray:
    """Values stored with white at zero as if black were: from the largest that `bits` hold, or of those there."""
    inverted: np.ndarray
    if values.dtype.kind == "u":
        inverted = values.dtype.type(2**bits - 1) - values
    elif values.dtype.kind == "i":
        inverted = ~values
    else:
        inverted = np.nanmax(values) + np.nanmin(values) - values
    return inverted


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
    stored = _decode(path, as_labels=False)
    if stored.lossy:
        return _jpeg_mask(stored.values, path)
    values, alpha = stored.values, stored.alpha
    grey = bool((values == values[..., :1]).all())
    codes = _number_codes(values, path) if grey or values.shape[2] != 3 else _colour_codes(values, path)
    if alpha is not None and alpha.min() != alpha.max():
        if len(np.unique(codes[alpha != 0])) > 1:
            raise DataError(f"{path}: both its colours and its transparency vary; save the mask as PNG without alpha")
        codes, grey = alpha.astype(np.int64), True
    if len(np.unique(codes[codes != 0])) > 1:
        held = _listed(codes, coloured=not grey)
        raise DataError(f"{path}: is not binary, it holds {held}; say which object each value is (labels)")
    return np.asarray(codes != 0)


def _jpeg_mask(values: np.ndarray, path: Path) -> Mask:
    """The mask in a JPEG, (H, W, C) uint8, of any one colour on black; DataError where that cannot be what it shows.

    Compression blurs the border and leaves noise around it. So the largest channel counts, the largest value there is
    taken as that of the mask, and nothing but a border may lie between a quarter and three quarters of it.
    """
    values = values.max(axis=2)
    top = int(values.max())
    if 0 < top < _DARKEST_MASK:
        raise DataError(f"{path}: its largest value is {top}, which JPEG does not keep; save the mask as PNG")
    mask: Mask = values > top / 2
    flat = mask.astype(np.uint8)
    border = np.ones((_JPEG_BORDER, _JPEG_BORDER), np.uint8)
    away = cv2.dilate(flat, border) == cv2.erode(flat, border)
    between = (values > top / 4) & (values < 3 * top / 4)
    if (between & away).mean() > _MOST_BETWEEN:
        raise DataError(f"{path}: is not black and one colour, so no mask is read from it; save the mask as PNG")
    return mask


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
    if values.dtype.kind == "f" and not (np.isfinite(values) & (np.rint(values) == values)).all():
        raise DataError(f"{path}: holds fractions, a mask holds whole numbers; save it as 8- or 16-bit PNG")
    if (values != values[..., :1]).any():
        raise DataError(f"{path}: is coloured, not a map of label numbers; name its colours ('#rrggbb') in the labels")
    return values[..., 0].astype(np.int64)


def _colour_codes(values: np.ndarray, path: Path) -> np.ndarray:
    """The colour of each pixel as 0xRRGGBB, (H, W) int64; grey counts as that colour."""
    if values.dtype != np.uint8 or values.shape[2] not in (1, 3):
        raise DataError(f"{path}: is not an 8-bit colour image; save the mask as 8-bit PNG")
    red, green, blue = (values[..., channel if values.shape[2] == 3 else 0].astype(np.int64) for channel in range(3))
    return red << 16 | green << 8 | blue


def _listed(codes: np.ndarray, coloured: bool) -> str:
    """The values of a label map as text, at most eight of them."""
    values = np.unique(codes)
    shown = ", ".join(f"#{value:06x}" if coloured else str(value) for value in values[:8])
    return f"{len(values)} values ({shown}{', ...' if len(values) > 8 else ''})"
