"""Volumes: NIfTI, DICOM, NRRD, MetaImage and FreeSurfer's MGH in, slices as images, masks back on the source's grid.

Voxels are indexed [i, j, k], and `Volume.affine` takes them to the world (see there). The slices of a `SliceView` are
what a radiologist expects to see; `writing`, `label_maps`,
`dicom_output` and `rtstruct` write masks, `measures` measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ibisagent.errors import DataError
from ibisagent.volumes.grid import Volume
from ibisagent.volumes.headers import SUFFIXES
from ibisagent.volumes.views import SliceView
from ibisagent.volumes.windows import Window, parse_window

__all__ = ["SliceView", "Volume", "Window", "is_volume", "parse_window", "read_volume", "whole_series"]

_NIBABEL = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz", ".mgh", ".mgz", ".mgh.gz")
_ITK = (".mha", ".mhd", ".nrrd", ".nhdr")


def is_volume(path: str | Path) -> bool:
    """Whether `read_volume` rather than `read_image` reads this: a folder, or a file known by its name or content."""
    path = Path(path)
    return path.is_dir() or _kind(path) is not None


def read_volume(
    path: str | Path | Sequence[str | Path], *, channel: int | None = None, series: str | None = None
) -> Volume:
    """The volume in a NIfTI, MGH, NRRD, MetaImage or DICOM file, in a folder of DICOM files, or in a ZIP archive.

    A DICOM file alone is read alone, one frame or many; a folder is searched with all below it, and must hold one
    series, or `series` says which: its UID, or its number in the list that the error message gives. Multiple files are
    read as the DICOM folder that holds no others would be.
    channel: which of the volumes (time points, echoes, components) on one grid, from 0.
    Raises DataError naming the file and the remedy, ConfigError for a format whose library is not installed.
    """
    if not isinstance(path, str | Path):
        return _read_files([Path(file) for file in path], channel, series)
    path = Path(path)
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path")
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes); export or copy it again")
    except OSError as error:
        raise DataError(f"'{str(path)[:200]}': cannot be read ({error.strerror}); check name and rights") from error
    kind = "dicom" if path.is_dir() else _kind(path)
    if kind == "nibabel":
        from ibisagent.volumes.nifti import read_nifti

        return read_nifti(path, channel)
    if kind == "itk":
        from ibisagent.volumes.itk import read_itk

        return read_itk(path, channel)
    if kind == "dicom":
        from ibisagent.volumes.dicom import read_dicom

        return read_dicom(path, channel, series)
    if kind == "zip":
        from ibisagent.volumes.archives import read_archive

        return read_archive(path, channel, series)
    raise DataError(f"{path}: is no NIfTI, MGH, DICOM, NRRD or MetaImage file; convert it to NIfTI")


def whole_series(paths: Sequence[str]) -> list[list[str]]:
    """The paths of a command line in groups, each one thing to segment: slices of one series and folder are together.

    So `series/*.dcm` is one volume. Files that do not say where they lie stay alone: they are views, not slices. What
    cannot be read goes to the slices beside it, whose reader passes it over and says so.
    """
    if sum(path.lower().endswith(SUFFIXES) or _kind(Path(path)) == "dicom" for path in paths) < 2:
        return [[path] for path in paths]
    groups: dict[object, list[str]] = {}
    unreadable: list[str] = []
    series: dict[Path, set[object]] = {}
    for place, path in enumerate(paths):
        try:
            uid = _series_of_slice(Path(path))
        except DataError:
            unreadable.append(path)
            continue
        own = place if uid is None else (uid, Path(path).parent)
        if uid is not None:
            series.setdefault(Path(path).parent, set()).add(own)
        groups.setdefault(own, []).append(path)
    for path in unreadable:
        beside = series.get(Path(path).parent, set())
        groups.setdefault(next(iter(beside)) if len(beside) == 1 else path, []).append(path)
    return list(groups.values())


def _series_of_slice(path: Path) -> str | None:
    """The series that a DICOM file is a slice of; None for other files. DataError for a DICOM file that is damaged."""
    if not path.is_file() or not (path.name.lower().endswith(SUFFIXES) or _kind(path) == "dicom"):
        return None
    from ibisagent.volumes.headers import numbers, read_header

    header = read_header(path)
    placed = numbers(header.get("ImagePositionPatient"), 3) is not None
    return str(header.get("SeriesInstanceUID") or "") or None if placed else None


def _read_files(files: Sequence[Path], channel: int | None, series: str | None) -> Volume:
    if not files:
        raise DataError("no file to read a volume of; name one")
    if len(files) == 1:
        return read_volume(files[0], channel=channel, series=series)
    if wrong := [file for file in files if not file.is_file()]:
        raise DataError(f"{wrong[0]}: is no file; check the path")
    from ibisagent.volumes.dicom import read_dicom

    return read_dicom(files[0].parent, channel, series, files)


def _kind(path: Path) -> str | None:
    """The format by content where that is known, else by name; None for anything else, or no file."""
    name = path.name.lower()
    try:
        with path.open("rb") as file:
            head = file.read(352)
    except (OSError, ValueError):
        head = b""
    if head[128:132] == b"DICM":
        return "dicom"
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2"):
        return "nibabel"
    if head.startswith((b"NRRD0", b"ObjectType = Image", b"NDims = ")):
        return "itk"
    for kind, suffixes in (("nibabel", _NIBABEL), ("itk", _ITK), ("dicom", SUFFIXES), ("zip", (".zip",))):
        if name.endswith(suffixes):
            return kind
    return None
