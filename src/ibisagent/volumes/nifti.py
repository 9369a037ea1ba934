"""NIfTI and FreeSurfer's MGH in, by nibabel."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ibisagent.errors import DataError, IbisError, TooLargeError
from ibisagent.imaging import limits
from ibisagent.volumes.grid import NiftiOrigin, Volume, choose_channel, scratch
from ibisagent.volumes.headers import told

_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_CHUNK = 2**24
_HEADER_BYTES, _MOST_EXTENSIONS = 540, 2**24  # of NIfTI-2; nibabel reads all that lies between header and voxels


def read_nifti(path: Path, channel: int | None) -> Volume:
    """A NIfTI-1 or NIfTI-2 file or pair, or a FreeSurfer MGH file; see `volumes.read_volume`.

    Plain or gzipped is told by the content, whatever the name says. Plain files are mapped, not loaded.
    """
    import nibabel as nib

    try:
        _check_extensions(path)
        image = _open(path)
        if not isinstance(image, nib.Nifti1Pair | nib.MGHImage):
            raise DataError(
                f"{path}: is Analyze 7.5, which does not say which side is left; convert it to NIfTI with its scanner's"
                " files at hand"
            )
        header, affine = image.header, np.asarray(image.affine, dtype=np.float64)
        slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    except IbisError:
        raise
    except Exception as error:  # a damaged header can fail anywhere inside the reader
        raise _damaged(path, error) from error
    dtype, shape = np.dtype(header.get_data_dtype()), tuple(int(side) for side in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise DataError(f"{path}: has {' x '.join(map(str, shape))} voxels, expected 3 sides, or 4 to choose one of")
    coloured = dtype.names is not None
    if dtype.kind == "c" or (coloured and dtype.itemsize not in (3, 4)):
        raise DataError(f"{path}: holds {dtype} values; save real numbers")
    grid = (*shape[:3], 1)[:3]
    limits.check_voxels(grid, path, bytes_each=dtype.itemsize)
    chosen = choose_channel(shape[3] if len(shape) == 4 else 1, channel, str(path))
    stored = _stored(path, image, dtype, grid, chosen)
    voxels = np.stack([stored[name] for name in "RGB"], axis=-1) if coloured else stored
    nifti = isinstance(image, nib.Nifti1Pair)
    unit = _MM_PER_UNIT[header.get_xyzt_units()[0]] if nifti else 1.0
    world = np.diag([unit, unit, unit, 1.0]) @ affine
    origin = NiftiOrigin(_as_single(header), affine) if nifti else None
    return Volume(voxels, world, _name(path), slope=slope, intercept=intercept, origin=origin)


def _open(path: Path) -> Any:
    """The image of nibabel, its header read and its voxels not; by its content, not by its name."""
    import nibabel as nib

    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".hdr", ".img")):
        return nib.load(path)
    zipped = _is_zipped(path)
    with gzip.open(path) if zipped else path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    kind: Any
    if name.endswith((".mgh", ".mgz")):
        kind = nib.MGHImage
    else:
        kind = nib.Nifti2Image if head[4:7] in (b"n+2", b"ni2") else nib.Nifti1Image
    if zipped == path.name.lower().endswith((".gz", ".mgz")):
        return kind.from_filename(path) if head[344:347] != b"ni1" else nib.load(path)
    holder = nib.FileHolder(fileobj=gzip.open(path) if zipped else path.open("rb"), filename=str(path))  # noqa: SIM115
    try:
        return kind.from_file_map({"header": holder, "image": holder})
    finally:
        holder.fileobj.close()


def _is_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _as_single(header: Any) -> Any:
    """The header as one of a file that holds voxels too, which masks are written with."""
    import nibabel as nib

    kind = nib.Nifti2Header if "Nifti2" in type(header).__name__ else nib.Nifti1Header
    return kind.from_header(header, check=False) if type(header) is not kind else header.copy()


def _name(path: Path) -> str:
    return Path(path.name[:-3] if path.name.lower().endswith(".gz") else path.name).stem


def _check_extensions(path: Path) -> None:
    """TooLargeError where the header says that the voxels begin after more than any header extension holds."""
    import nibabel as nib

    with gzip.open(path) if _is_zipped(path) else path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    kind = nib.Nifti2Header if b"n+2" in head[4:8] else nib.Nifti1Header
    size = kind.template_dtype.itemsize
    if len(head) >= size and kind(head[:size], check=False)["vox_offset"] > _MOST_EXTENSIONS:
        raise TooLargeError(f"{path}: its voxels begin after more than {_MOST_EXTENSIONS} bytes; save it again")


def _stored(path: Path, image: Any, dtype: np.dtype[Any], grid: tuple[int, ...], channel: int) -> np.ndarray:
    """The chosen volume as stored, (I, J, K); mapped where the file is plain."""
    count = math.prod(grid)
    start = int(image.dataobj.offset) + channel * count * dtype.itemsize
    file = Path(image.file_map["image"].filename or path)
    if not file.is_file():
        raise DataError(f"{path}: is half of a pair, and {file.name} is not beside it; copy both into one folder")
    try:
        if not _is_zipped(file):
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
    said = type(error)(str(error).replace(str(path), "it")) if type(error).__init__ is Exception.__init__ else error
    return DataError(f"{path}: damaged, cut off or not NIfTI{told(said)}; export or copy it again")
