"""What DICOM headers say: read whole or in one line said why not; attributes of a frame; which hold an image."""

from __future__ import annotations

import logging
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import DataError, IbisError, TooLargeError
from ibisagent.files import one_line
from ibisagent.imaging import limits

SUFFIXES = (".dcm", ".dicom", ".ima")
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_COPIES = 4  # of an inflated file that pydicom and its decoders hold at a time
_CHUNK = 2**20
_process_wide = threading.Lock()  # warning filters and log levels belong to the whole process
_OF_PYTHON = (AttributeError, TypeError, KeyError, IndexError, AssertionError, RecursionError, UnicodeError)
_OF_CONVERSIONS = ("invalid literal", "could not convert", "cannot convert", "cannot reshape", "setting an array")


def has_preamble(path: Path) -> bool:
    """Whether a file begins as DICOM files do; some older ones do not."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def may_be_dicom(path: Path) -> bool:
    """By its beginning or its name, unread."""
    return has_preamble(path) or path.suffix.lower() in SUFFIXES


def is_of_class(path: Path, *classes: str) -> bool:
    """Whether the file is DICOM of one of these SOP classes."""
    return has_preamble(path) and str(read_header(path).get("SOPClassUID", "")) in classes


def long_string(text: str) -> str:
    """As DICOM's long strings are: 64 characters, no backslash."""
    return text.replace("\\", "/")[:64]


def makers(provenance: Mapping[str, str]) -> str:
    """Policy and segmenter as a long string, without the folders that a path may hold."""
    parts = [provenance.get(part, "").rsplit("/", 1)[-1] for part in ("policy", "segmenter")]
    return long_string(" with ".join(part for part in parts if part) or "ibisagent")


def read_header(path: Path) -> Any:
    """Everything but the pixels, as a pydicom Dataset. DataError if it is no DICOM file or damaged."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with quiet():
            _check_deflated(path)
            try:
                return pydicom.dcmread(path, stop_before_pixels=True)
            except InvalidDicomError:
                header = pydicom.dcmread(path, stop_before_pixels=True, force=True)  # written without its preamble
                if "SOPClassUID" not in header and "Rows" not in header:
                    raise
                return header
    except IbisError:
        raise
    except InvalidDicomError as error:
        raise DataError(f"{path}: is not DICOM; export or copy it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check name and rights") from error
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise _damaged(str(path), error) from error


def _check_deflated(path: Path) -> None:
    """TooLargeError where a file of the deflated transfer syntax, which pydicom inflates at once, is beyond limits."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with path.open("rb") as file:
        read_preamble(file, force=True)
        meta = read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflating, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflating.unconsumed_tail or file.read(_CHUNK):
            size += len(inflating.decompress(chunk, _CHUNK))
            if size > limits.current().volume_bytes // _COPIES:
                raise TooLargeError(f"{path}: deflated, and unpacks to {size} bytes or more; save it as explicit VR")


def check_image(path: Path, header: Any) -> None:
    """DataError unless the header is one of an image that is read."""
    kind = str(header.get("SOPClassUID", "") or "")
    name = getattr(header.get("SOPClassUID", ""), "name", "") or "DICOM"
    if kind == _MEDIA_DIRECTORY or "DirectoryRecordSequence" in header:
        raise DataError(f"{path}: is a DICOMDIR, an index of files; name the folder of the series")
    if kind in SEGMENTATIONS:
        raise DataError(f"{path}: is a segmentation, not an image; give it as --start-mask")
    needed = ("Rows", "Columns", "PhotometricInterpretation", "BitsAllocated")
    missing = [name for name in needed if header.get(name) in (None, "")]
    if missing:
        raise DataError(f"{path}: holds no image ({name} without {missing[0]}); name an image")
    if not header.Rows or not header.Columns:
        raise DataError(f"{path}: has no pixels ({header.Columns} x {header.Rows}); export it again")
    if kind == _WHOLE_SLIDE and (
        frame_count(header, path) > 1 or "TILED" in str(header.get("DimensionOrganizationType"))
    ):
        raise DataError(f"{path}: is a whole-slide image cut into tiles; save the region to segment as PNG or TIFF")


def frame_count(header: Any, where: object) -> int:
    """How many frames that the header claims; DataError if that is no number above 0."""
    try:
        count = int(header.get("NumberOfFrames", 1) or 1)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: does not say how many frames it has; correct NumberOfFrames") from error
    if count < 1:
        raise DataError(f"{where}: says that it has {count} frames; correct NumberOfFrames")
    return count


def attribute(header: Any, groups: Iterable[Any], group: str, name: str) -> Any:
    """The value of a functional group of the frame or of all frames, else of the header itself."""
    for item in groups:
        inner = first_item(item, group)
        if inner is not None and name in inner:
            return inner.get(name)
    return header.get(name)


def first_item(header: Any, name: str) -> Any:
    """The first item of a sequence, None where it is empty or not there."""
    sequence = header.get(name)
    return sequence[0] if sequence else None


def numbers(value: Any, count: int) -> np.ndarray | None:
    """Exactly `count` finite numbers, or None."""
    if value in (None, "") or not hasattr(value, "__len__") or len(value) != count:
        return None
    found = np.array([float(number) for number in value])
    return found if np.isfinite(found).all() else None


def first_value(value: Any) -> float | None:
    """The first of one or more numbers; None where there is none."""
    if value in (None, ""):
        return None
    if isinstance(value, str | int | float) or not hasattr(value, "__getitem__"):
        return float(value)
    return float(value[0]) if len(value) else None


def first_number(value: Any) -> float:
    """A number to sort by; 0 where there is none."""
    try:
        return first_value(value) or 0.0
    except (TypeError, ValueError):
        return 0.0


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom warns of every irregular value and logs the failures that it raises; what matters is checked here."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "openjpeg")]
    with _process_wide, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def turning_damage_into_one_line(where: str) -> Iterator[None]:
    """Whatever the block raises that is no error on purpose becomes a DataError about `where`."""
    try:
        yield
    except IbisError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside the decoders
        raise _damaged(where, error) from error


def _damaged(where: str, error: Exception) -> DataError:
    reason = told(error)
    if "'JPEG Extended'" in str(error):  # its one decoder is GPL-3.0, so it does not come with this package
        return DataError(f"{where}: is 12-bit lossy JPEG; pip install pylibjpeg pylibjpeg-libjpeg reads it")
    return DataError(f"{where}: damaged, cut off or of an unknown kind{reason}; export or copy it again")


def told(error: BaseException) -> str:
    """What a library says of a file, as " (...)"; nothing where it is Python that speaks, which helps nobody."""
    said = one_line(error, 160)
    if isinstance(error, _OF_PYTHON) or not str(error).strip() or any(part in said for part in _OF_CONVERSIONS):
        return ""
    return f" ({said})"


def is_no_image(header: Any) -> bool:
    """Whether this is a DICOM object of another kind: a report, a plan, a segmentation, an index of files."""
    return "Rows" not in header or str(header.get("SOPClassUID", "")) in SEGMENTATIONS
