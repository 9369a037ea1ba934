"""DICOM in, by pydicom and its decoders: series of files, single files, multi-frame files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import DataError, TooLargeError
from ibisagent.imaging import limits
from ibisagent.imaging.limits.headers import check_codestream
from ibisagent.volumes.folders import Images, choose_series, images_below, images_of
from ibisagent.volumes.frames import Frame, arrange, frames_of
from ibisagent.volumes.grid import DicomOrigin, Volume, scratch
from ibisagent.volumes.headers import (
    attribute,
    check_image,
    first_item,
    first_number,
    first_value,
    frame_count,
    quiet,
    read_header,
    turning_damage_into_one_line,
)
from ibisagent.volumes.windows import Window, level_width, sigmoid

_RUN_LENGTHS = "1.2.840.10008.1.2.5"
_CHUNK = 2**20
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def read_dicom(path: Path, channel: int | None, series: str | None, files: Sequence[Path] | None = None) -> Volume:
    """A DICOM file, or a folder with the files of a series; see `volumes.read_volume`.

    Rescale slope and intercept (or the modality LUT) are applied, palettes and YBR become RGB. Of multiple stacks of
    slices (a localizer among them) the one of the most slices is read, unless `series` says which, as SERIES/STACK.
    Slices may lie at uneven distances, see `Volume.heights`; a missing one is refused. files: those of the folder
    `path` that are meant.
    """
    where = str(path)
    wanted, _, number = (series or "").partition("/")
    if path.is_dir():
        found = images_below(path) if files is None else images_of(files)
        images = choose_series(path, found, wanted or None)
        identity = str(next(iter(images.headers.values())).get("SeriesInstanceUID", ""))
    else:
        header = read_header(path)
        check_image(path, header)
        images = Images({path: header}, {})
        identity = str(header.get("SOPInstanceUID", "") or path.name)
    headers = images.headers
    with turning_damage_into_one_line(where):
        _check_cost(headers, where)
        frames = [frame for file, header in headers.items() for frame in frames_of(file, header)]
    stack = arrange(frames, channel, int(number) if number.isdigit() else None, where)
    middle = stack.frames[len(stack.frames) // 2]
    shown = headers[middle.path]
    with turning_damage_into_one_line(where), quiet():
        voxels, rescale = _decode(stack.frames, headers)
        window = _file_window(shown, middle.index)
    modality = str(shown.get("Modality", "") or "")
    places = tuple((frame.path, frame.index) for frame in stack.frames)
    return Volume(
        voxels,
        stack.affine,
        f"{modality or 'image'}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}",
        slope=rescale[0],
        intercept=rescale[1],
        modality=modality,
        oriented=stack.positions is not None,
        spacing_known=stack.spacing_known,
        window=window,
        inverted=str(shown.PhotometricInterpretation) == "MONOCHROME1",
        heights=stack.heights,
        notes=(*images.notes, *stack.notes),
        origin=DicomOrigin(places, stack.positions, middle.tile is not None),
    )


def instance_numbers(volume: Volume) -> list[int]:
    """DICOM's InstanceNumber of each slice k; the number of the frame, from 1, where one file holds multiple slices.

    [] for a volume that is not DICOM.
    """
    frames = volume.origin.frames if isinstance(volume.origin, DicomOrigin) else ()
    if len({file for file, _ in frames}) < len(frames):
        return [index + 1 for _, index in frames]
    return [int(first_number(read_header(file).get("InstanceNumber"))) for file, _ in frames]


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


def _decode(frames: Sequence[Frame], headers: Mapping[Path, Any]) -> tuple[np.ndarray, tuple[float, float]]:
    """Voxels (I, J, K[, 3]) and their slope and intercept; real values at once where these differ between slices."""
    from pydicom.pixels import apply_modality_lut

    rescales = {frame.rescale for frame in frames}
    curved = any(_has_table(headers[frame.path], "ModalityLUTSequence") for frame in frames)
    at_once = len(rescales) > 1 or curved
    voxels: np.ndarray | None = None
    for k, (frame, stored) in enumerate(zip(frames, _stored(frames, headers), strict=True)):
        if stored.ndim == 2 and at_once:
            header = headers[frame.path]
            if _has_table(header, "ModalityLUTSequence"):
                stored = apply_modality_lut(stored, header)
            else:
                stored = stored * frame.rescale[0] + frame.rescale[1]
            stored = stored.astype(np.float32)
        if voxels is None:
            voxels = scratch((len(frames), *stored.shape), stored.dtype.newbyteorder("="))
        if stored.shape != voxels.shape[1:]:
            raise ValueError(f"frame {k} has the shape {stored.shape}, expected {voxels.shape[1:]}")
        voxels[k] = stored
    if voxels is None:
        raise ValueError("it holds no frame")
    return np.moveaxis(voxels, (0, 1, 2), (2, 1, 0)), (1.0, 0.0) if at_once or voxels.ndim == 4 else frames[0].rescale


def _stored(frames: Iterable[Frame], headers: Mapping[Path, Any]) -> Iterator[np.ndarray]:
    """The decoded pixels of each frame, (H, W) as stored or (H, W, 3) uint8; one file is in memory at a time."""
    import pydicom
    from pydicom.pixels import apply_color_lut, iter_pixels

    for path, wanted in groupby(frames, key=lambda frame: frame.path):
        header = headers[path]
        asked = list(wanted)
        with turning_damage_into_one_line(str(path)):
            dataset = pydicom.dcmread(path, force=True)
            if not any(name in dataset for name in _PIXELS):
                raise DataError(f"{path}: has the header of an image and no pixels; export it again with its image")
            if "TransferSyntaxUID" not in dataset.file_meta:
                implicit, little = dataset.original_encoding
                dataset.file_meta.TransferSyntaxUID = _uncompressed(bool(implicit), bool(little))
            check_compressed_frames(dataset, path)
            decoded = iter_pixels(dataset, indices=list(dict.fromkeys(frame.index for frame in asked)))
            for _, tiles in groupby(asked, key=lambda frame: frame.index):
                pixels = next(decoded)
                if str(header.PhotometricInterpretation) == "PALETTE COLOR":
                    pixels = apply_color_lut(pixels, header)
                pixels = _eight_bits(pixels, header) if pixels.ndim == 3 else pixels
                for frame in tiles:
                    yield pixels if frame.tile is None else pixels[frame.tile]


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


def _file_window(header: Any, index: int) -> Window | None:
    """The window that the file proposes for its frame `index`; None where it proposes none."""
    group = first_item(header, "SharedFunctionalGroupsSequence")
    each = header.get("PerFrameFunctionalGroupsSequence") or []
    groups = [found for found in (each[index] if each else None, group) if found is not None]
    centre = first_value(attribute(header, groups, "FrameVOILUTSequence", "WindowCenter"))
    width = first_value(attribute(header, groups, "FrameVOILUTSequence", "WindowWidth"))
    function = str(attribute(header, groups, "FrameVOILUTSequence", "VOILUTFunction") or "LINEAR")
    if centre is None or width is None or width <= 0:
        return _table_window(header)
    if function == "SIGMOID":
        return sigmoid(centre, width)
    if function == "LINEAR_EXACT" or width <= 1:
        return level_width(centre, width)
    return level_width(centre - 0.5, width - 1)  # DICOM PS3.3, C.11.2.1.2.1


def _has_table(header: Any, name: str) -> bool:
    """Whether the first item of a sequence of lookup tables holds one; some programs leave it empty."""
    item = first_item(header, name)
    return item is not None and bool(item.get("LUTData")) and len(item.get("LUTDescriptor") or ()) == 3


def _table_window(header: Any) -> Window | None:
    """The first VOI LUT as a window with a table."""
    item = first_item(header, "VOILUTSequence")
    if item is None or not _has_table(header, "VOILUTSequence"):
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
