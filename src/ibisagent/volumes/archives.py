"""ZIP archives of a series or of one volume, as archives and portals hand them out."""

from __future__ import annotations

import shutil
import tempfile
import weakref
import zipfile
import zlib
from pathlib import Path

from ibisagent.errors import DataError, TooLargeError
from ibisagent.imaging import limits
from ibisagent.volumes.grid import Volume
from ibisagent.volumes.headers import may_be_dicom, told

_CHUNK = 2**20


def read_archive(path: Path, channel: int | None, series: str | None) -> Volume:
    """The volume in a ZIP archive: of its one file that is a volume but not DICOM, else of its DICOM files.

    It is unpacked into a temporary folder that lives as long as the volume. TooLargeError beyond the limits, DataError
    for a damaged archive or one without a volume.
    """
    from ibisagent.volumes import is_volume, read_volume

    folder = Path(tempfile.mkdtemp(prefix="ibisagent-"))
    try:
        _unpack(path, folder)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _is_of_macos(file, folder)]
        others = [file for file in files if is_volume(file) and not may_be_dicom(file)]
        chosen = others[0] if len(others) == 1 else folder
        try:
            volume = read_volume(chosen, channel=channel, series=series)
        except DataError as error:
            raise type(error)(str(error).replace(str(folder), str(path))) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(volume, shutil.rmtree, folder, ignore_errors=True)
    return volume


def _unpack(path: Path, folder: Path) -> None:
    """All files of the archive below `folder`; counted while they are unpacked, since what it says may not be so."""
    most, size = limits.current().volume_bytes, 0
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            limits.check_frames(len(members), path)
            for member in members:
                target = folder / member.filename.lstrip("/\\")
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise DataError(f"{path}: would unpack '{member.filename[:80]}' elsewhere; pack it again")
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, target.open("wb") as file:
                    while part := packed.read(_CHUNK):
                        size += len(part)
                        if size > most:
                            raise TooLargeError(
                                f"{path}: unpacks to {size} bytes or more, at most {most} are read"
                                f"{limits.or_raise('voxels')}"
                            )
                        file.write(part)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be unpacked{told(error)}; pack or copy it again") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be unpacked ({error.strerror or error}); free space or copy it again"
        ) from error


def _is_of_macos(file: Path, folder: Path) -> bool:
    return file.name.startswith("._") or "__MACOSX" in file.relative_to(folder).parts
