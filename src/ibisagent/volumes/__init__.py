"""Volumes: NIfTI, DICOM, NRRD and MetaImage in, slices as pictures, masks back on the source's exact grid.

Voxels are indexed [i, j, k], and `Volume.affine` takes them to the world (see there). The slices of a `SliceView` are
what a radiologist expects to see; `writing`, `label_maps`,
`dicom_output` and `rtstruct` write masks, `measures` measures them.
"""

from __future__ import annotations

from pathlib import Path

from ibisagent.errors import DataError
from ibisagent.volumes.grid import Volume
from ibisagent.volumes.views import SliceView
from ibisagent.volumes.windows import Window, parse_window

__all__ = ["SliceView", "Volume", "Window", "is_volume", "parse_window", "read_volume"]

_NIFTI = (".nii", ".nii.gz")
_ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
_DICOM = (".dcm", ".dicom", ".ima")


def is_volume(path: str | Path) -> bool:
    """Whether `read_volume` rather than `read_image` reads this: a folder, or a file known by its name or content."""
    path = Path(path)
    return path.is_dir() or _kind(path) is not None


def read_volume(path: str | Path, *, channel: int | None = None, series: str | None = None) -> Volume:
    """The volume in a NIfTI, NRRD, MetaImage or DICOM file, or in a folder of DICOM files.

    A DICOM file alone is read alone, one frame or many; a folder is searched with all below it, and must hold one
    series, or `series` says which: its UID, or its number in the list that the error message gives.
    channel: which of several volumes (time points, echoes, components) on one grid, from 0.
    Raises DataError naming the file and the remedy, ConfigError for a format whose library is not installed.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path")
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes); export or copy it again")
    except OSError as error:
        raise DataError(f"{str(path)[:200]!r}: cannot be read ({error.strerror}); check name and rights") from error
    kind = "dicom" if path.is_dir() else _kind(path)
    if kind == "nifti":
        from ibisagent.volumes.nifti import read_nifti

        return read_nifti(path, channel)
    if kind == "itk":
        from ibisagent.volumes.itk import read_itk

        return read_itk(path, channel)
    if kind == "dicom":
        from ibisagent.volumes.dicom import read_dicom

        return read_dicom(path, channel, series)
    raise DataError(f"{path}: is no NIfTI, DICOM, NRRD or MetaImage file; convert it to NIfTI")


def _kind(path: Path) -> str | None:
    """The format by name, else by content; None for anything else, or no file."""
    name = path.name.lower()
    for kind, suffixes in (("nifti", _NIFTI), ("itk", _ITK), ("dicom", _DICOM)):
        if name.endswith(suffixes):
            return kind
    try:
        with path.open("rb") as file:
            head = file.read(352)
    except (OSError, ValueError):
        return None
    if head[128:132] == b"DICM":
        return "dicom"
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] == b"n+2":
        return "nifti"
    if head.startswith((b"NRRD0", b"ObjectType = Image", b"NDims = ")):
        return "itk"
    return None
