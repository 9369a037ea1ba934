"""DICOMweb: a series from a server (QIDO, WADO), objects to a server (STOW), by dicomweb-client.

Servers are named by URL: `http://server/dicom-web/studies/UID/series/UID`, or the study alone where it has one series
of images; to store, `http://server/dicom-web`. A bearer token is read from IBIS_DICOMWEB_TOKEN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ibisagent.errors import ConfigError, DataError

TOKEN_VARIABLE = "IBIS_DICOMWEB_TOKEN"
_NO_IMAGES = ("SEG", "SR", "RTSTRUCT", "RTPLAN", "PR", "KO", "DOC", "REG")


def is_url(text: str) -> bool:
    """Whether a user means a server rather than a file."""
    return text.startswith(("http://", "https://"))


def fetch_series(url: str, folder: Path) -> None:
    """Write the files of the series that `url` names into `folder`, under numbers.

    Raises ConfigError for a URL that names no study or series, or without dicomweb-client, DataError when the server
    refuses, has no such series, or the study has several.
    """
    from dicomweb_client.uri import URI

    if "/studies/" not in url:
        raise ConfigError(f"{_safe(url)}: names no study; give SERVER/studies/UID, or SERVER/studies/UID/series/UID")
    try:
        parsed = URI.from_string(url.rstrip("/"))
    except ValueError as error:
        raise ConfigError(f"{_safe(url)}: is no DICOMweb address ({error})") from error
    study, series = str(parsed.study_instance_uid), parsed.series_instance_uid
    client = _client(str(parsed.base_url))
    with _one_line(str(parsed.base_url)):
        if series is None:
            series = _only_series(client, study)
        count = 0
        everything = (("application/dicom", "*"),)  # as stored: the server need not decompress
        for dataset in client.iter_series(study, str(series), media_types=everything):
            dataset.save_as(folder / f"{count:05d}.dcm", enforce_file_format=True)
            count += 1
    if not count:
        raise DataError(f"{_safe(url)}: the server has no such series")


def store(url: str, files: Sequence[Path]) -> None:
    """Send DICOM files to the server `url`. DataError when it refuses one, ConfigError without dicomweb-client."""
    import pydicom

    client = _client(url.rstrip("/"))
    with _one_line(url):
        answer = client.store_instances([pydicom.dcmread(file) for file in files])
        refused = answer.get("FailedSOPSequence") or []
        if refused:
            raise DataError(f"{_safe(url)}: refused {len(refused)} of {len(files)} files; see the server's log")


def _only_series(client: Any, study: str) -> str:
    """The one series of a study that may hold images."""
    found = [
        (str(_value(item, "0020000E")), str(_value(item, "00080060") or "?"), _value(item, "00201209"))
        for item in client.search_for_series(study, fields=["Modality", "NumberOfSeriesRelatedInstances"])
    ]
    images = [row for row in found if row[1] not in _NO_IMAGES]
    if len(images) != 1:
        listed = ", ".join(f"{uid} ({modality}, {count or '?'} files)" for uid, modality, count in images[:8])
        raise DataError(f"the study has {len(images)} series of images: {listed}; give the address of one of them")
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
