"""NIfTI in, by nibabel."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ibisagent.errors import DataError, IbisError, TooLargeError
from ibisagent.files import one_line
from ibisagent.imaging import limits
from ibisagent.volumes.grid import NiftiOrigin, Volume, choose_channel, scratch

_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_CHUNK = 2**24
_HEADER_BYTES, _MOST_EXTENSIONS = 540, 2**24  # of NIfTI-2; nibabel reads all that lies between header and voxels


def read_nifti(path: Path, channel: int | None) -> Volume:
    """A NIfTI-1 or NIfTI-2 file, plain or gzipped; see `volumes.read_volume`. Plain files are mapped, not loaded."""
    import nibabel as nib

    try:
        _check_extensions(path)
        image: Any = nib.load(path)
        if not isinstance(image, nib.Nifti1Pair):
            raise DataError(f"{path}: is {type(image).__name__}, not NIfTI; convert it to NIfTI")
        header, affine = image.header, np.asarray(image.affine, dtype=np.float64)
        slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    except IbisError:
        raise
    except Exception as error:  # a damaged header can fail anywhere inside the reader
        raise _damaged(path, error) from error
    dtype, shape = header.get_data_dtype(), tuple(int(side) for side in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise DataError(f"{path}: has the shape {shape}, expected 3 sides, or 4 of which one is chosen")
    coloured = dtype.names is not None
    if dtype.kind == "c" or (coloured and dtype.itemsize not in (3, 4)):
        raise DataError(f"{path}: holds {dtype} values; save real numbers")
    grid = (*shape[:3], 1)[:3]
    limits.check_voxels(grid, path, bytes_each=dtype.itemsize)
    chosen = choose_channel(shape[3] if len(shape) == 4 else 1, channel, str(path))
    stored = _stored(path, image, dtype, grid, chosen)
    voxels = np.stack([stored[name] for name in "RGB"], axis=-1) if coloured else stored
    unit = _MM_PER_UNIT[header.get_xyzt_units()[0]]
    world = np.diag([unit, unit, unit, 1.0]) @ affine
    name = path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem
    return Volume(
        voxels,
        world,
        name,
        slope=slope,
        intercept=intercept,
        origin=NiftiOrigin(header.copy(), affine),
    )


def _check_extensions(path: Path) -> None:
    """TooLargeError where the header says that the voxels begin after more than any header extension holds."""
    import nibabel as nib

    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        head = gzip.GzipFile(fileobj=file).read(_HEADER_BYTES) if zipped else file.read(_HEADER_BYTES)
    kind = nib.Nifti2Header if b"n+2" in head[4:8] else nib.Nifti1Header
    size = kind.template_dtype.itemsize
    if len(head) >= size and kind(head[:size], check=False)["vox_offset"] > _MOST_EXTENSIONS:
        raise TooLargeError(f"{path}: its voxels begin after more than {_MOST_EXTENSIONS} bytes; save it again")


def _stored(path: Path, image: Any, dtype: np.dtype[Any], grid: tuple[int, ...], channel: int) -> np.ndarray:
    """The chosen volume as stored, (I, J, K); mapped where the file is plain."""
    count = math.prod(grid)
    start = int(image.dataobj.offset) + channel * count * dtype.itemsize
    file = Path(image.file_map["image"].filename)
    try:
        with file.open("rb") as opened:
            zipped = opened.read(2) == b"\x1f\x8b"
        if not zipped:
            if file.stat().st_size < start + count * dtype.itemsize:
                raise EOFError("it ends before its last voxel")
            return np.memmap(file, dtype, "r", start, grid, "F")
        limits.check_unpacked(start + count * dtype.itemsize, path)  # what lies before the chosen volume, too
        voxels = scratch(grid[::-1], dtype)
        with gzip.open(file) as unzipped:
            unzipped.seek(start)
            _fill(cast(IO[bytes], unzipped), memoryview(voxels.reshape(-1).view(np.uint8).data))
        return voxels.transpose()
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, error) from error


def _fill(file: IO[bytes], target: memoryview) -> None:
    done = 0
    while done < len(target):
        part = file.read(min(_CHUNK, len(target) - done))
        if not part:
            raise EOFError("it ends before its last voxel")
        target[done : done + len(part)] = part
        done += len(part)


def _damaged(path: Path, error: Exception) -> DataError:
    reason = one_line(str(error).replace(str(path), "it") or type(error).__name__, 160)
    return DataError(f"{path}: damaged, cut off or not NIfTI ({reason}); export or copy it again")
