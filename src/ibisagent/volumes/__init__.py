"""Volumes: NIfTI, DICOM, NRRD, MetaImage and FreeSurfer's MGH in, slices as images, masks back on the source's grid.

Voxels are indexed [i, j, k], and `Volume.affine` takes them to the world (see there). The slices of a `SliceView` are
what a radiologist expects to see; `writing` and `clinic` write masks, `measures` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ibisagent.errors import DataError
from ibisagent.volumes.grid import Volume
from ibisagent.volumes.views import SliceView
from ibisagent.volumes.windows import Window, parse_window

__all__ = ["SliceView", "Volume", "Window", "is_volume", "parse_window", "read_volume", "whole_series"]

_NIBABEL = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz", ".mgh", ".mgz", ".mgh.gz")
_ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
_DICOM = (".dcm", ".dicom", ".ima")


def is_volume(path: str | Path) -> bool:
    """Whether `read_volume` rather than `read_image` reads this: a folder, or a file known by its name or content."""
    path = Path(path)
    return path.is_dir() or _kind(path) is not None


def read_volume(
    path: str | Path | Sequence[str | Path], *, channel: int | None = None, series: str | None = None
) -> Volume:
    """The volume in a NIfTI, MGH, NRRD, MetaImage or DICOM file, in a folder of DICOM files, or a ZIP archive of either.

    A DICOM file alone is read alone, one frame or many; a folder is searched with all below it, and must hold one
    series, or `series` says which: its UID, or its number in the list that the error message gives. Several files are
    read as the DICOM folder that holds no others would be.
    channel: which of several volumes (time points, echoes, components) on one grid, from 0.
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


def whole_series(paths: Iterable[str]) -> list[list[str]]:
    """The paths of a command line, with the DICOM slices of one series and folder (`series/*.dcm`) put together.

    Each of the lists is one thing to segment. Files that do not say where they lie stay alone: they are views, not
    slices.
    """
    from ibisagent.volumes.headers import numbers, read_header

    paths = list(paths)
    candidates = [path for path in paths if Path(path).is_file() and _kind(Path(path)) == "dicom"]
    if len(candidates) < 2:
        return [[path] for path in paths]
    groups: dict[object, list[str]] = {}
    for place, path in enumerate(paths):
        own: object = place
        if path in candidates:
            try:
                header = read_header(Path(path))
            except DataError:
                own = ("unreadable", Path(path).parent)
            else:
                if numbers(header.get("ImagePositionPatient"), 3) is not None and "SeriesInstanceUID" in header:
                    own = (str(header.SeriesInstanceUID), Path(path).parent)
        groups.setdefault(own, []).append(path)
    for broken in [own for own in groups if isinstance(own, tuple) and own[0] == "unreadable"]:
        others = [own for own in groups if isinstance(own, tuple) and own[1] == broken[1] and own != broken]
        if len(others) == 1:  # a reader of the series passes them over, and says so
            groups[others[0]] += groups.pop(broken)
    return [
        part
        for own, files in groups.items()
        for part in ([files] if not (isinstance(own, tuple) and own[0] == "unreadable") else [[file] for file in files])
    ]


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
    for kind, suffixes in (("nibabel", _NIBABEL), ("itk", _ITK), ("dicom", _DICOM), ("zip", (".zip",))):
        if name.endswith(suffixes):
            return kind
    return None
