"""DICOMweb: a series from a server (QIDO, WADO), objects to a server (STOW), by dicomweb-client.

Servers are named by URL: `http://server/dicom-web/studies/UID/series/UID`, or the study alone where it has one series
of images; to store, `http://server/dicom-web`. A bearer token is read from IBIS_DICOMWEB_TOKEN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibisagent.errors import ConfigError, DataError
from ibisagent.volumes.headers import is_no_image

TOKEN_VARIABLE = "IBIS_DICOMWEB_TOKEN"
_NO_IMAGES = ("SEG", "SR", "RTSTRUCT", "RTPLAN", "PR", "KO", "DOC", "REG")


def is_url(text: str) -> bool:
    """Whether a user means a server rather than a file."""
    return text.startswith(("http://", "https://"))


def fetch_series(url: str, folder: Path) -> None:
    """Write the files of the series that `url` names into `folder`, under numbers.

    Raises ConfigError for a URL that names no study or series, or without dicomweb-client, DataError when the server
    refuses, has no such series, or the study has more than one.
    """
    server, study, series = _parsed(url)
    client = _client(server)
    with _one_line(server):
        if series is None:
            series = _only_series(client, study)
        count = 0
        everything = (("application/dicom", "*"),)  # as stored: the server need not decompress
        for dataset in client.iter_series(study, str(series), media_types=everything):
            dataset.save_as(folder / f"{count:05d}.dcm", enforce_file_format=True)
            count += 1
    if not count:
        raise DataError(f"{_safe(url)}: the server has no such series")


@dataclass(frozen=True, slots=True)
class Series:
    """A series of images on a server: its UID and its study's, and its modality."""

    uid: str
    study: str
    modality: str


def find_series(url: str, series: str | None = None) -> list[Series]:
    """The series of images on the DICOMweb server `url`: all of them, or that with the UID `series`.

    Raises ConfigError without dicomweb-client, DataError where the server refuses.
    """
    client = _client(url.rstrip("/"))
    asked = {} if series is None else {"SeriesInstanceUID": series}
    with _one_line(url):
        found = client.search_for_series(search_filters=asked, fields=["Modality", "StudyInstanceUID"])
    listed = [
        Series(str(_value(item, "0020000E")), str(_value(item, "0020000D")), str(_value(item, "00080060") or ""))
        for item in found
    ]
    return [one for one in listed if one.modality not in _NO_IMAGES and series in (None, one.uid)]


def store(url: str, files: Sequence[Path]) -> None:
    """Send DICOM files to the server `url`. DataError when it refuses one, ConfigError without dicomweb-client."""
    import pydicom

    client = _client(url.rstrip("/"))
    with _one_line(url):
        answer = client.store_instances([pydicom.dcmread(file) for file in files])
        refused = answer.get("FailedSOPSequence") or []
        if refused:
            raise DataError(f"{_safe(url)}: refused {len(refused)} of {len(files)} files; see the server's log")


def series_metadata(url: str) -> Iterator[tuple[str, dict[Path, Any]]]:
    """The series of a study, or the one series that `url` names: its address, and the headers of its images.

    Headers are keyed by instance, as if that were a file; nothing is stored. Raises as `fetch_series` does.
    """
    import pydicom

    server, study, wanted = _parsed(url)
    client = _client(server)
    with _one_line(server):
        found = [str(_value(item, "0020000E")) for item in client.search_for_series(study)]
        for series in found if wanted is None else [wanted]:
            instances = client.retrieve_series_metadata(study, series)
            headers: dict[Path, Any] = {}
            for item in instances:
                header = pydicom.Dataset.from_json(item, lambda *_: b"")
                headers[Path(str(header.SOPInstanceUID))] = header
            images = {path: header for path, header in headers.items() if "Rows" in header and not is_no_image(header)}
            yield f"{server}/studies/{study}/series/{series}", images
    if not found:
        raise DataError(f"{_safe(url)}: the server has no such study")


def _parsed(url: str) -> tuple[str, str, str | None]:
    """(server, study, series or None) of an address."""
    from dicomweb_client.uri import URI

    if "/studies/" not in url:
        raise ConfigError(f"{_safe(url)}: names no study; give SERVER/studies/UID, or SERVER/studies/UID/series/UID")
    try:
        parsed = URI.from_string(url.rstrip("/"))
    except ValueError as error:
        raise ConfigError(f"{_safe(url)}: is no DICOMweb address ({error})") from error
    series = parsed.series_instance_uid
    return str(parsed.base_url), str(parsed.study_instance_uid), None if series is None else str(series)


def _only_series(client: Any, study: str) -> str:
    """The one series of a study that may hold images."""
    found = [
        (str(_value(item, "0020000E")), str(_value(item, "00080060") or "?"), _value(item, "00201209"))
        for item in client.search_for_series(study, fields=["Modality", "NumberOfSeriesRelatedInstances"])
    ]
    images = [row for row in found if row[1] not in _NO_IMAGES]
    if len(images) != 1:
        listed = ", ".join(f"{uid} ({modality}, {count or '?'} files)" for uid, modality, count in images[:8])
        raise DataError(
            f"the study has {len(images)} series of images: {listed}; give the address of one of them;"
            " 'ibisagent data series' tells more of them"
        )
    return images[0][0]


def _value(item: Any, tag: str) -> Any:
    values = item.get(tag, {}).get("Value") or [None]
    return values[0]


def _client(url: str) -> Any:
    try:
        from dicomweb_client.api import DICOMwebClient
    except ImportError as error:
        raise ConfigError("DICOMweb needs dicomweb-client: pip install 'ibisagent[medical]'") from error
    token = os.environ.get(TOKEN_VARIABLE)
    client = DICOMwebClient(url, headers={"Authorization": f"Bearer {token}"} if token else None)
    client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=100)  # a dead server is told in a second
    return client


@contextmanager
def _one_line(url: str) -> Iterator[None]:
    """Network and protocol errors become a DataError that names the server and nothing of what was asked."""
    import requests

    try:
        yield
    except requests.HTTPError as error:
        code = "?" if error.response is None else error.response.status_code
        raise DataError(
            f"{_safe(url)}: the server answered {code}; check address, rights and {TOKEN_VARIABLE}"
        ) from error
    except (requests.RequestException, ConnectionError) as error:
        reason = type(error).__name__
        raise DataError(f"{_safe(url)}: cannot be reached ({reason}); check address and server") from error


def _safe(url: str) -> str:
    """The server's address alone: what follows names a patient's study, what stands before @ is a secret."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.split('/studies', 1)[0].rpartition('@')[2]}"
