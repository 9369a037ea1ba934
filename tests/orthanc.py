"""A DICOMweb server that others wrote: Orthanc, on loopback with an empty database."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopback import free_port

PROGRAM = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
PLUGIN = next(Path("/usr/share/orthanc/plugins").glob("libOrthancDicomWeb*"), None)
MISSING = "" if PROGRAM and PLUGIN else "Orthanc is not installed (Debian packages orthanc and orthanc-dicomweb)"


@contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """The DICOMweb address of an Orthanc that keeps itself in `folder`, for the block. MISSING must be empty."""
    assert PROGRAM, MISSING
    port = free_port()
    settings = {
        "StorageDirectory": str(folder / "orthanc"),
        "IndexDirectory": str(folder / "orthanc"),
        "HttpPort": port,
        "DicomServerEnabled": False,  # its port, too, would have to be free
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [str(PLUGIN)],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    address, log = f"http://127.0.0.1:{port}/dicom-web", folder / "orthanc.log"
    with log.open("wb") as said:
        process = subprocess.Popen([PROGRAM, str(folder / "orthanc.json")], stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 60
            while not _answers(address):
                assert time.monotonic() < deadline, f"Orthanc did not start: {log.read_text()[-500:]}"
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/studies", timeout=2).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True
