"""What is handed out as one file: the results of a job, of a session, what a user corrected."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from ibisagent.errors import ConfigError
from ibisagent.files import file_names, write_whole
from ibisagent.inference.session import Session
from ibisagent.server.storage import remove

if TYPE_CHECKING:
    from ibisagent.server.service import Service


def zipped(folder: Path) -> bytes:
    """The files of a folder and those below it as a zip, without hidden ones (what is being written)."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                archive.write(path, name)
    return packed.getvalue()


def export_zip(service: Service, session: Session) -> bytes:
    """Masks, overlay, records and report of a session."""
    folder = service.scratch()
    try:
        name = file_names([session.image.source or "image"])[0]
        session.export(folder, name)
        write_whole(session.report().encode(), folder / f"{name}_report.html")
        return zipped(folder)
    finally:
        remove(folder)


def training_zip(service: Service, session: Session) -> bytes:
    """What `Session.export_training` writes. ConfigError where no user has corrected anything."""
    folder = service.scratch()
    try:
        if not session.export_training(folder):
            raise ConfigError("there is nothing to learn from: no turn of this session is a user's")
        return zipped(folder)
    finally:
        remove(folder)
