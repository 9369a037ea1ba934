"""The data folder of a server: who owns it, when what is in it was last used, and whether there is room."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ibisagent.errors import ConfigError, DataError
from ibisagent.files import one_line, write_whole

LOCK_FILE, OWNER_FILE = "server.lock", "server.json"
LEAST_FREE = 2**20  # bytes below which no work is taken
_STARTED = time.time() - time.monotonic()
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Ownership:
    """Holds a data folder for one process, until it is released or the process ends, however that happens."""

    def __init__(self, folder: Path, address: str = "") -> None:
        """address: where the server will be found, for whoever asks for the folder next.

        ConfigError that names the owner where another process, or another server of this one, holds the folder.
        """
        self._lock = FileLock(folder / LOCK_FILE, mode=0o600, thread_local=False)  # whichever thread closes
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            owner = _owner(folder / OWNER_FILE)
            raise ConfigError(f"{folder}: is in use by {owner}; use it, stop it, or give another --data") from error
        except OSError as error:
            raise DataError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        facts = {
            "process": os.getpid(),
            "machine": socket.gethostname(),
            "address": address,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        write_whole(json.dumps(facts).encode(), folder / OWNER_FILE)
        (folder / OWNER_FILE).chmod(0o600)

    def release(self) -> None:
        """Let the next one in."""
        self._lock.release()


def _owner(file: Path) -> str:
    """Who holds a folder, as text."""
    try:
        facts: dict[str, Any] = json.loads(file.read_bytes())
        where = f" at {facts['address']}" if facts["address"] else ""
        said = f"process {facts['process']} on {facts['machine']}{where}, since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is only just starting
        return "another process"
    return one_line(said, 200)


def clock() -> float:
    """Seconds since 1970, by which ages are counted: what the machine's clock said at the start, and the time since.

    So whoever sets the clock of a running server forward makes nothing old.
    """
    return _STARTED + time.monotonic()


def used(folder: Path) -> float:
    """When `folder` was last used, in seconds since 1970; 0 where it is gone. Its own time on the disk says so, which
    survives restarts."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def note_use(folder: Path) -> None:
    """`folder` is used now; one that is gone meanwhile stays gone."""
    now = clock()
    try:
        os.utime(folder, (now, now))
    except FileNotFoundError:
        return


def keep_if_possible(content: bytes, path: Path) -> None:
    """Write what can be made again at any time; where that fails, it is made again."""
    try:
        write_whole(content, path)
    except DataError:
        return


def trouble(folder: Path, probe: Path) -> str | None:
    """Why no work can be kept in `folder`; None where it can. probe: a path in it that is written and removed."""
    try:
        free = shutil.disk_usage(folder).free
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        return no_room(error) or f"the data folder cannot be written ({error.strerror})"
    if free < LEAST_FREE:
        return f"the disk of the data folder is full ({free} bytes are free): delete something, or give it another disk"
    return None


def no_room(error: BaseException | None) -> str | None:
    """What to tell a client where an error, or what caused it, is a full disk; None for any other error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            reason = os.strerror(error.errno or 0)
            return f"the server's disk cannot be written ({reason}): nothing was changed; try again when there is room"
        error = error.__cause__ or error.__context__
    return None


def remove(path: Path) -> None:
    """Delete a file or a folder with all in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
