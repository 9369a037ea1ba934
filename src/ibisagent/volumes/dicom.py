"""DICOM in, by pydicom and its decoders: series of files, single files, multi-frame files."""

from __future__ import annotations

import hashlib
import logging
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import DataError, IbisError, TooLargeError
from ibisagent.files import one_line
from ibisagent.imaging import limits
from ibisagent.imaging.limits.headers import check_codestream
from ibisagent.volumes.grid import LPS, DicomOrigin, Volume, choose_channel, scratch
from ibisagent.volumes.windows import Window, level_width, sigmoid

GAP = 0.05
"""By which share of their spacing slices may lie beside an even grid before one counts as missing."""

PARALLEL = 1e-3
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_TIMES = ("TemporalPositionIdentifier", "EchoNumbers", "TriggerTime", "AcquisitionNumber", "InstanceNumber")
_RUN_LENGTHS = "1.2.840.10008.1.2.5"
_COPIES = 4  # of an inflated file that pydicom and its decoders hold at a time
_CHUNK = 2**20
_process_wide = threading.Lock()  # warning filters and log levels belong to the whole process


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """One frame: where it is stored, and where it lies in the patient; None where the file does not say."""

    path: Path
    index: int
    size: tuple[int, int]
    spacing: tuple[float, float] | None
    orientation: np.ndarray | None
    position: np.ndarray | None
    rescale: tuple[float, float]
    order: tuple[float, ...]


def read_dicom(path: Path, channel: int | None, series: str | None) -> Volume:
    """A DICOM file, or a folder with the files of a series; see `volumes.read_volume`.

    Rescale slope and intercept (or the modality LUT) are applied, palettes and YBR become RGB. The slices must form an
    even grid: a missing one, several series, sizes or orientations are refused.
    """
    if path.is_dir():
        headers = _choose_series(path, _headers_below(path), series)
        where = str(path)
        identity = str(next(iter(headers.values())).get("SeriesInstanceUID", ""))
    else:
        headers = {path: read_header(path)}
        where = str(path)
        identity = str(headers[path].get("SOPInstanceUID", "") or path.name)
    for file, header in headers.items():
        _check_image(file, header)
    first = next(iter(headers.values()))
    with turning_damage_into_one_line(where):
        _check_cost(headers, where)
        frames = [frame for file, header in headers.items() for frame in _frames(file, header)]
    frames, affine, oriented, spacing_known = _arrange(frames, channel, where)
    with turning_damage_into_one_line(where), quiet():
        voxels, rescale = _decode(frames, headers)
        window = _file_window(headers[frames[len(frames) // 2].path], first)
    modality = str(first.get("Modality", "") or "")
    return Volume(
        voxels,
        affine,
        f"{modality or 'image'}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}",
        slope=rescale[0],
        intercept=rescale[1],
        modality=modality,
        oriented=oriented,
        spacing_known=spacing_known,
        window=window,
        inverted=str(first.PhotometricInterpretation) == "MONOCHROME1",
        origin=DicomOrigin(tuple((frame.path, frame.index) for frame in frames)),
    )


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


def _headers_below(folder: Path) -> dict[Path, Any]:
    """The headers of all images below `folder`; what is no DICOM file, or none with pixels, is passed over."""
    headers: dict[Path, Any] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and _may_be_dicom(file):
            header = read_header(file)
            if "Rows" in header and str(header.get("SOPClassUID", "")) not in SEGMENTATIONS:
                headers[file] = header
    if not headers:
        raise DataError(f"{folder}: holds no DICOM image; name an image file, or a folder with a DICOM series")
    return headers


def _may_be_dicom(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM" or file.suffix.lower() in (".dcm", ".dicom", ".ima")


def _choose_series(folder: Path, headers: Mapping[Path, Any], wanted: str | None) -> dict[Path, Any]:
    found: dict[str, dict[Path, Any]] = {}
    for file, header in headers.items():
        found.setdefault(str(header.get("SeriesInstanceUID", "")), {})[file] = header
    ordered = sorted(found, key=lambda uid: (_number(next(iter(found[uid].values())).get("SeriesNumber")), uid))
    if wanted is None and len(ordered) == 1:
        return found[ordered[0]]
    if wanted in found:
        return found[wanted]
    if wanted is not None and wanted.isdigit() and 1 <= int(wanted) <= len(ordered):
        return found[ordered[int(wanted) - 1]]
    shown = [
        f"{number} ({next(iter(found[uid].values())).get('Modality', '?')}, {len(found[uid])} files)"
        for number, uid in enumerate(ordered, 1)
    ]
    listed = ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
    raise DataError(f"{folder}: holds {len(ordered)} series: {listed}; choose with --series, or name its own folder")


def _check_image(path: Path, header: Any) -> None:
    """DataError unless the header is one of a picture that is read."""
    kind = str(header.get("SOPClassUID", "") or "")
    name = getattr(header.get("SOPClassUID", ""), "name", "") or "DICOM"
    if kind == _MEDIA_DIRECTORY or "DirectoryRecordSequence" in header:
        raise DataError(f"{path}: is a DICOMDIR, an index of files; name the folder of the series")
    if kind in SEGMENTATIONS:
        raise DataError(f"{path}: is a segmentation, not an image; give it as --start-mask")
    needed = ("Rows", "Columns", "PhotometricInterpretation", "BitsAllocated")
    missing = [name for name in needed if header.get(name) in (None, "")]
    if missing:
        raise DataError(f"{path}: holds no picture ({name} without {missing[0]}); name an image")
    if not header.Rows or not header.Columns:
        raise DataError(f"{path}: has no pixels ({header.Columns} x {header.Rows}); export it again")


def _check_cost(headers: Mapping[Path, Any], where: str) -> None:
    """TooLargeError unless what the headers claim together is within the limits."""
    counts = {file: frame_count(header, file) for file, header in headers.items()}
    limits.check_frames(sum(counts.values()), where)
    voxels = size = 0
    for file, header in headers.items():
        pixels = int(header.Rows) * int(header.Columns)
        voxels += counts[file] * pixels
        samples, bits = int(header.get("SamplesPerPixel", 1) or 1), int(header.BitsAllocated)
        size += counts[file] * pixels * samples * -(-bits // 8)
    limits.check_voxels([voxels], where)
    limits.check_unpacked(size, where)


def frame_count(header: Any, where: object) -> int:
    """How many frames that the header claims; DataError if that is no number above 0."""
    try:
        count = int(header.get("NumberOfFrames", 1) or 1)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: does not say how many frames it has ({one_line(error)}); correct NumberOfFrames"
        ) from error
    if count < 1:
        raise DataError(f"{where}: says that it has {count} frames; correct NumberOfFrames")
    return count


def _frames(path: Path, header: Any) -> list[_Frame]:
    """The frames of one file, as its functional groups, its dose grid or its own attributes place them."""
    count = frame_count(header, path)
    shared = first_item(header, "SharedFunctionalGroupsSequence")
    each = header.get("PerFrameFunctionalGroupsSequence") or []
    if each and len(each) != count:
        raise ValueError(f"describes {len(each)} frames and holds {count}")
    offsets = header.get("GridFrameOffsetVector")
    size = int(header.Rows), int(header.Columns)
    frames = []
    for index in range(count):
        groups = [group for group in (each[index] if each else None, shared) if group is not None]
        orientation = numbers(attribute(header, groups, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
        position = numbers(attribute(header, groups, "PlanePositionSequence", "ImagePositionPatient"), 3)
        if count > 1 and not each:
            if offsets is not None and position is not None and orientation is not None and len(offsets) == count:
                shift = float(offsets[index]) - (float(offsets[0]) if float(offsets[0]) else 0.0)
                position = position + _normal(orientation) * shift
            else:
                orientation = position = None  # a loop in time, or frames whose places are not told
        spacing = numbers(attribute(header, groups, "PixelMeasuresSequence", "PixelSpacing"), 2)
        if spacing is None and "ImagerPixelSpacing" in header:
            spacing = numbers(header.ImagerPixelSpacing, 2)
        slope = attribute(header, groups, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = attribute(header, groups, "PixelValueTransformationSequence", "RescaleIntercept")
        if slope in (None, "") and header.get("DoseGridScaling"):
            slope = header.DoseGridScaling
        rescale = float(1 if slope in (None, "") else slope), float(0 if intercept in (None, "") else intercept)
        frames.append(
            _Frame(
                path,
                index,
                size,
                None if spacing is None or (spacing <= 0).any() else (float(spacing[0]), float(spacing[1])),
                orientation,
                position,
                rescale,
                (*(_number(header.get(name)) for name in _TIMES), float(index)),
            )
        )
    return frames


def _arrange(frames: list[_Frame], channel: int | None, where: str) -> tuple[list[_Frame], np.ndarray, bool, bool]:
    """(the frames of one even grid in order, its affine, whether oriented, whether the spacing is known)."""
    first = frames[0]
    if any(frame.size != first.size for frame in frames):
        sizes = ", ".join(sorted({f"{frame.size[1]} x {frame.size[0]}" for frame in frames}))
        raise DataError(f"{where}: its slices have different sizes ({sizes}); keep one kind of slice in the folder")
    spacing = first.spacing or (1.0, 1.0)
    placed = [frame for frame in frames if frame.position is not None and frame.orientation is not None]
    if not placed:
        affine = np.diag([spacing[1], spacing[0], 1.0, 1.0])
        return sorted(frames, key=lambda frame: frame.order), affine, False, first.spacing is not None
    if len(placed) < len(frames):
        raise DataError(f"{where}: some of its {len(frames)} slices do not say where they lie; remove those")
    orientation = np.asarray(first.orientation)
    for frame in frames:
        if np.abs(np.asarray(frame.orientation) - orientation).max() > PARALLEL * 10 or frame.spacing != first.spacing:
            raise DataError(f"{where}: its slices are not parallel or not equally spaced; keep one stack in the folder")
    across, down = orientation[:3], orientation[3:]
    normal = _normal(orientation)
    if abs(np.linalg.norm(across) - 1) > 0.01 or abs(np.linalg.norm(normal) - 1) > 0.01:
        raise DataError(f"{where}: states an impossible orientation; correct ImageOrientationPatient")
    stacks: list[list[_Frame]] = []
    heights: list[float] = []
    for frame in sorted(frames, key=lambda frame: float(normal @ np.asarray(frame.position))):
        height = float(normal @ np.asarray(frame.position))
        if heights and height - heights[-1] < 1e-3:
            stacks[-1].append(frame)
        else:
            heights.append(height)
            stacks.append([frame])
    counts = {len(stack) for stack in stacks}
    if len(counts) > 1:
        raise DataError(
            f"{where}: has {min(counts)} slices at some places and {max(counts)} at others; one may be missing or twice"
        )
    chosen_index = choose_channel(counts.pop(), channel, where)
    chosen = [sorted(stack, key=lambda frame: frame.order)[chosen_index] for stack in stacks]
    positions = np.array([frame.position for frame in chosen])
    step = (positions[-1] - positions[0]) / (len(chosen) - 1) if len(chosen) > 1 else normal * _thickness(chosen[0])
    _check_even(positions, normal, where)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * spacing[1], down * spacing[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    return chosen, LPS @ affine, True, first.spacing is not None


def _check_even(positions: np.ndarray, normal: np.ndarray, where: str) -> None:
    """DataError naming the gap unless the positions (K, 3) lie evenly on a line."""
    if len(positions) < 3:
        return
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    odd = int(np.argmax(np.abs(gaps - usual)))
    if abs(gaps[odd] - usual) > GAP * usual:
        raise DataError(
            f"{where}: slices {odd} and {odd + 1} are {gaps[odd]:.2f} mm apart, the others {usual:.2f} mm:"
            " a slice is missing or the spacing varies; complete the series"
        )
    even = np.linspace(positions[0], positions[-1], len(positions))
    if np.abs(positions - even).max() > max(GAP * usual, 0.01):
        raise DataError(f"{where}: its slices do not lie on a line; keep one stack in the folder")


def _thickness(frame: _Frame) -> float:
    """Of a lone slice, 1 mm where unknown; it places nothing, but gives volumes."""
    header = read_header(frame.path)
    shared = first_item(header, "SharedFunctionalGroupsSequence")
    groups = [] if shared is None else [shared]
    thickness = attribute(header, groups, "PixelMeasuresSequence", "SliceThickness")
    return float(thickness) if thickness not in (None, "") and float(thickness) > 0 else 1.0


def _decode(frames: list[_Frame], headers: Mapping[Path, Any]) -> tuple[np.ndarray, tuple[float, float]]:
    """Voxels (I, J, K[, 3]) and their slope and intercept; real values at once where these differ between slices."""
    from pydicom.pixels import apply_modality_lut

    rescales = {frame.rescale for frame in frames}
    curved = any("ModalityLUTSequence" in headers[frame.path] for frame in frames)
    at_once = len(rescales) > 1 or curved
    voxels: np.ndarray | None = None
    for k, (frame, stored) in enumerate(zip(frames, _stored(frames, headers), strict=True)):
        if stored.ndim == 2 and at_once:
            header = headers[frame.path]
            stored = apply_modality_lut(stored, header) if curved else stored * frame.rescale[0] + frame.rescale[1]
            stored = stored.astype(np.float32)
        if voxels is None:
            voxels = scratch((len(frames), *stored.shape), stored.dtype.newbyteorder("="))
        if stored.shape != voxels.shape[1:]:
            raise ValueError(f"frame {k} has the shape {stored.shape}, expected {voxels.shape[1:]}")
        voxels[k] = stored
    if voxels is None:
        raise ValueError("it holds no frame")
    return np.moveaxis(voxels, (0, 1, 2), (2, 1, 0)), (1.0, 0.0) if at_once or voxels.ndim == 4 else frames[0].rescale


def _stored(frames: Iterable[_Frame], headers: Mapping[Path, Any]) -> Iterator[np.ndarray]:
    """The decoded pixels of each frame, (H, W) as stored or (H, W, 3) uint8; one file is in memory at a time."""
    import pydicom
    from pydicom.pixels import apply_color_lut, iter_pixels

    for path, wanted in groupby(frames, key=lambda frame: frame.path):
        dataset, header = pydicom.dcmread(path, force=True), headers[path]
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            dataset.file_meta.TransferSyntaxUID = _uncompressed(bool(implicit), bool(little))
        check_compressed_frames(dataset, path)
        for pixels in iter_pixels(dataset, indices=[frame.index for frame in wanted]):
            if str(header.PhotometricInterpretation) == "PALETTE COLOR":
                pixels = apply_color_lut(pixels, header)
            yield _eight_bits(pixels, header) if pixels.ndim == 3 else pixels


def check_compressed_frames(dataset: Any, path: Path) -> None:
    """TooLargeError where a compressed frame says, or must unpack to, more than the header says of it.

    Decoders make room for what the frame itself says before that is compared with the header.
    """
    from pydicom.encaps import generate_frames

    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    tables = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    samples, bits = int(dataset.get("SamplesPerPixel", 1) or 1), int(dataset.BitsAllocated)
    pixels = int(dataset.Rows) * int(dataset.Columns)
    for number, frame in enumerate(
        generate_frames(
            dataset.PixelData,
            number_of_frames=frame_count(dataset, path),
            extended_offsets=tables if all(tables) else None,
        )
    ):
        where = f"{path}, frame {number}"
        if dataset.file_meta.TransferSyntaxUID == _RUN_LENGTHS:
            if len(frame) > 2 * pixels * samples * -(-bits // 8) + _CHUNK:
                raise TooLargeError(f"{where}: its run lengths are longer than its pixels; export it again")
        else:
            check_codestream(frame, pixels, samples, where)


def _uncompressed(implicit: bool, little: bool) -> Any:
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _eight_bits(pixels: np.ndarray, header: Any) -> np.ndarray:
    """Colours as (H, W, 3) uint8."""
    if pixels.dtype == np.uint8:
        return pixels[..., :3]
    palette = str(header.PhotometricInterpretation) == "PALETTE COLOR"
    bits = pixels.dtype.itemsize * 8 if palette else int(header.BitsStored)
    eight: np.ndarray = (pixels[..., :3].astype(np.float64) * (255 / (2.0**bits - 1))).clip(0, 255).astype(np.uint8)
    return eight


def _file_window(header: Any, first: Any) -> Window | None:
    """The window that the file proposes, from the given frame's header; None where it proposes none."""
    group = first_item(header, "SharedFunctionalGroupsSequence")
    each = header.get("PerFrameFunctionalGroupsSequence") or []
    groups = [found for found in (each[len(each) // 2] if each else None, group) if found is not None]
    centre = _first(attribute(header, groups, "FrameVOILUTSequence", "WindowCenter"))
    width = _first(attribute(header, groups, "FrameVOILUTSequence", "WindowWidth"))
    function = str(attribute(header, groups, "FrameVOILUTSequence", "VOILUTFunction") or "LINEAR")
    if centre is None or width is None or width <= 0:
        return _table_window(first)
    if function == "SIGMOID":
        return sigmoid(centre, width)
    if function == "LINEAR_EXACT" or width <= 1:
        return level_width(centre, width)
    return level_width(centre - 0.5, width - 1)  # DICOM PS3.3, C.11.2.1.2.1


def _table_window(header: Any) -> Window | None:
    """The first VOI LUT as a window with a table."""
    item = first_item(header, "VOILUTSequence")
    if item is None or "LUTData" not in item or "LUTDescriptor" not in item:
        return None
    count, start, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 2**16
    if start >= 2**15 and int(header.get("PixelRepresentation", 0)) == 1:
        start -= 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * count else "u1")
    table = np.asarray(data).astype(np.float64)[:count]
    return Window(float(start), float(start + len(table) - 1), table) if len(table) > 1 and bits else None


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


def _first(value: Any) -> float | None:
    if value in (None, ""):
        return None
    if isinstance(value, str | int | float) or not hasattr(value, "__getitem__"):
        return float(value)
    return float(value[0]) if len(value) else None


def _number(value: Any) -> float:
    """A number to sort by; 0 where there is none."""
    try:
        return _first(value) or 0.0
    except (TypeError, ValueError):
        return 0.0


def _normal(orientation: np.ndarray) -> np.ndarray:
    return np.cross(orientation[:3], orientation[3:])


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
    reason = one_line(error, 160)
    if "'JPEG Extended'" in reason:  # its one decoder is GPL-3.0, so it does not come with this package
        return DataError(f"{where}: is 12-bit lossy JPEG; pip install pylibjpeg pylibjpeg-libjpeg reads it")
    return DataError(f"{where}: damaged, cut off or of an unknown kind ({reason}); export or copy it again")
