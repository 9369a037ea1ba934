"""What two data sets share: images that look alike, and patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from ibisagent.datasets.rows import CaseSource
from ibisagent.errors import ConfigError, DataError

BANDS = 16
NEAR_BITS = 6
"""Images whose fingerprints differ in at most so many of 256 bits are taken to be the same one."""


def fingerprint(pixels: np.ndarray) -> str:
    """256 bits as hex, alike for images that look alike: where brightness rises to the right on a 16 x 16 grid."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (17, 16), interpolation=cv2.INTER_AREA).astype(np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1] + 1).tobytes().hex()


def near_duplicates(asked: Mapping[str, str], known: Mapping[str, str], bits: int) -> dict[str, tuple[str, int]]:
    """{name in `asked`: (the most similar in `known`, bits that differ)} of all that differ in at most `bits`.

    asked, known: fingerprints by name. bits: below BANDS; then two that are alike agree in one of BANDS bands at least,
    so that the time is linear in the images. ConfigError for more.
    """
    if not 0 <= bits < BANDS:
        raise ConfigError(f"near duplicates within {bits} bits: give 0 to {BANDS - 1}")
    bands: dict[tuple[int, bytes], list[str]] = {}
    codes = {name: _code(text) for name, text in known.items()}
    for name, code in codes.items():
        for band in _bands(code):
            bands.setdefault(band, []).append(name)
    found = {}
    for name, text in asked.items():
        code = _code(text)
        near = {other for band in _bands(code) for other in bands.get(band, ())}
        distances = sorted((int(np.unpackbits(code ^ codes[other]).sum()), other) for other in near)
        if distances and distances[0][0] <= bits:
            found[name] = distances[0][1], distances[0][0]
    return found


@dataclass(frozen=True, slots=True)
class Leaks:
    """What a data set has in common with another one.

    images: (image, the one that it looks like, bits that differ). patients: names in both. known: whether either
    side names patients at all. unread: images that could not be read, one line each.
    """

    compared: tuple[int, int]
    images: tuple[tuple[str, str, int], ...]
    patients: tuple[str, ...]
    patients_known: tuple[bool, bool]
    unread: tuple[str, ...]


def find_leaks(
    cases: CaseSource, others: CaseSource, *, bits: int = NEAR_BITS, on_image: Callable[[], None] | None = None
) -> Leaks:
    """Images of `cases` that look like one of `others`, and patients in both. on_image: called after each image.

    Patients are compared by their names as the data give them. Flat images are left out, as all of them look alike.
    """
    unread: list[str] = []

    def fingerprints(source: CaseSource) -> dict[str, str]:
        found = {}
        for row in {row.image: row for row in source.rows}.values():
            try:
                code = fingerprint(source.decode(row).image.pixels)
            except DataError as error:
                unread.append(str(error))
            else:
                if any(bytes.fromhex(code)):
                    found[str(row.image)] = code
            if on_image is not None:
                on_image()
        return found

    mine, theirs = fingerprints(cases), fingerprints(others)
    alike = near_duplicates(mine, theirs, bits)
    patients = [{row.patient for row in source.rows if row.patient} for source in (cases, others)]
    return Leaks(
        (len(mine), len(theirs)),
        tuple((name, other, distance) for name, (other, distance) in sorted(alike.items())),
        tuple(sorted(patients[0] & patients[1])),
        (bool(patients[0]), bool(patients[1])),
        tuple(unread),
    )


def _code(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), dtype=np.uint8)


def _bands(code: np.ndarray) -> list[tuple[int, bytes]]:
    width = len(code) // BANDS
    return [(band, code[band * width : (band + 1) * width].tobytes()) for band in range(BANDS)]
