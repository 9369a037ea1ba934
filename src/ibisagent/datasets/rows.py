"""Rows and cases: what every reader gives, and how a row becomes a case when it is asked for."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from ibisagent.datasets.members import content_of, read_image_at, read_target
from ibisagent.domain import Case, Image, Mask
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import FileHashes, one_line

log = logging.getLogger(__name__)

_Read = TypeVar("_Read")
_SPLITS = {
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing"),
    "train": ("train", "training"),
}
_NOT_SAID = ("image", "mask", "where", "licence", "area")
"""Fields of a row from which nothing follows but where its files are, and what can be measured on them."""


class EmptyMaskError(DataError):
    """A mask that shows nothing: either a slip, or what its maker means by "absent"."""


@dataclass(frozen=True, slots=True)
class CaseRow:
    """One image-mask pair before any pixel is read. Texts are "" and `area` is None where nothing is known.

    id: relative image path, "#", object. image, mask: files, or addresses inside files (see `members`). mask: None
    where the object is known to be absent, or nothing is to be segmented. label: value of the object in a multi-label
    mask. where: "file, row n" for messages.
    """

    id: str
    image: Path
    mask: Path | None
    object: str
    query: str
    label: int | str | None = None
    answer: str | None = None
    modality: str = ""
    site: str = ""
    dataset: str = ""
    split: str = ""
    patient: str = ""
    licence_class: str = ""
    licence: str = ""
    area: float | None = None
    where: str = ""

    @property
    def meta(self) -> dict[str, str]:
        """What `Case.meta` holds: object, modality, site, dataset, split and licence_class, where known."""
        names = ("object", "modality", "site", "dataset", "split", "licence_class")
        return {name: value for name in names if (value := getattr(self, name))}


def split_kind(name: str) -> str:
    """ "train", "val" or "test" for a split of any of the usual names ("Training", "valid", "val2017"), else ""."""
    plain = re.sub(r"[^a-z]", "", name.casefold())
    return next((kind for kind, names in _SPLITS.items() if plain in names), "")


class CaseSource(Sequence[Case]):
    """Cases in a fixed order, decoded when asked for; `rows` is there at once. Slices and filters decode nothing."""

    def __init__(self, rows: Iterable[CaseRow], where: str) -> None:
        """rows: in their final order. where: the path they came from, for messages. DataError if there are none."""
        self.rows = tuple(rows)
        self.where = where
        if not self.rows:
            raise DataError(f"{where}: no image-mask pair is left; check the path and the filters")
        self._last_image: tuple[Path, Image] | None = None  # masks of one image follow each other: decode it once

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> CaseSource: ...
    def __getitem__(self, index: int | slice) -> Case | CaseSource:
        """The case at `index`, decoded now; a slice gives a CaseSource. DataError if its files cannot be used."""
        if isinstance(index, slice):
            return CaseSource(self.rows[index], self.where)
        return self.decode(self.rows[index])

    def __iter__(self) -> Iterator[Case]:
        return (self.decode(row) for row in self.rows)

    def filter(self, keep: Callable[[CaseRow], bool]) -> CaseSource:
        """The cases whose row passes `keep`, in the same order; DataError if none does."""
        return CaseSource(filter(keep, self.rows), self.where)

    def spread(self, count: int | None) -> CaseSource:
        """At most `count` (at least 1) of the cases, spread evenly over them; None: all."""
        if count is None or count >= len(self):
            return self
        step = len(self) / count
        return CaseSource([self.rows[int(index * step)] for index in range(count)], self.where)

    @property
    def by_id(self) -> Mapping[str, Case]:
        """The same cases by their id; each look-up decodes."""
        return _CasesById(self)

    @property
    def sha256(self) -> str:
        """Hash of what the rows say: which cases in which order, and all their texts. Not of what their files hold."""
        digest = hashlib.sha256()
        for row in self.rows:
            said = {field.name: getattr(row, field.name) for field in fields(row) if field.name not in _NOT_SAID}
            digest.update(repr((said, row.mask is None)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def contents(self, hashes: FileHashes) -> list[str]:
        """What the files of each row hold, as one hash a row: it changes with its image and its mask alone."""
        held = ([content_of(path, hashes) for path in (row.image, row.mask) if path is not None] for row in self.rows)
        return [hashlib.sha256(" ".join(each).encode()).hexdigest() for each in held]

    def ground_truths(self) -> Iterator[tuple[CaseRow, Mask]]:
        """Every row that has a mask, with its mask (H, W); images are not decoded. As for `readable`."""
        return self._readable([row for row in self.rows if row.mask is not None], _read_ground_truth)

    def readable(self) -> Iterator[tuple[CaseRow, Case]]:
        """Every row that can be decoded, with its case; a warning names each other one, as they cost no further row.

        DataError if none of them can be.
        """
        return self._readable(self.rows, self.decode)

    def _readable(self, rows: Sequence[CaseRow], read: Callable[[CaseRow], _Read]) -> Iterator[tuple[CaseRow, _Read]]:
        failed = 0
        for row in rows:
            try:
                found = read(row)
            except DataError as error:
                failed += 1
                log.warning("left out: %s", one_line(error, 300))
                if failed == len(rows):
                    raise DataError(
                        f"{self.where}: none of {failed} pairs can be read, the last one: {error}"
                    ) from error
            else:
                yield row, found

    def decode(self, row: CaseRow) -> Case:
        """The case of one row: reads its image and mask. DataError naming file, row and remedy if they do not fit."""
        last = self._last_image
        image = last[1] if last and last[0] == row.image else read_image_at(row.image)
        self._last_image = (row.image, image)
        targets: dict[str, Mask] | None = None
        if row.mask is not None:
            targets = {row.object: _read_ground_truth(row, image.size)}
        elif row.object:
            targets = {row.object: np.zeros(image.size, dtype=bool)}
        try:
            return Case(row.id, image, row.query, targets, answer=row.answer, patient=row.patient, meta=row.meta)
        except (ConfigError, DataError) as error:  # of its texts
            raise DataError(f"{row.where or row.id}: {error}") from error


class _CasesById(Mapping[str, Case]):
    """A CaseSource seen as a mapping; decodes on look-up."""

    def __init__(self, source: CaseSource) -> None:
        self._source = source
        self._rows = {row.id: row for row in source.rows}

    def __getitem__(self, case_id: str) -> Case:
        return self._source.decode(self._rows[case_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def split_by_patient(
    rows: Iterable[CaseRow], shares: Mapping[str, float], seed: int = 0
) -> dict[str, tuple[CaseRow, ...]]:
    """Share out rows so that no patient is in two splits: {split name: its rows, in their old order, `split` set}.

    shares: weight of each split by name, all > 0; they need not add up to 1. Patients are taken in an order that
    depends on `seed` and their names only, each into the split that lacks most rows. DataError for a row without
    patient, or more splits than patients; ConfigError for bad shares.
    """
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares.values()):
        raise ConfigError(f"shares {dict(shares)}: give every split a number above 0, for example train=0.8, val=0.2")
    patients: dict[str, int] = {}
    rows = tuple(rows)
    for row in rows:
        if not row.patient:
            raise DataError(f"{row.where or row.id}: names no patient, which a split needs; fill the 'patient' column")
        patients[row.patient] = patients.get(row.patient, 0) + 1
    if len(patients) < len(shares):
        raise DataError(f"{len(patients)} patients cannot fill {len(shares)} splits; give more data or fewer splits")
    total = sum(shares.values())
    lacking = {name: share / total * len(rows) for name, share in shares.items()}
    empty = list(shares)
    home: dict[str, str] = {}
    for patient in sorted(patients, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        # Keep enough patients back that no split stays empty, however large the first ones are.
        candidates = empty if len(patients) - len(home) <= len(empty) else list(shares)
        chosen = max(candidates, key=lambda name: lacking[name])
        home[patient] = chosen
        lacking[chosen] -= patients[patient]
        empty = [name for name in empty if name != chosen]
    return {name: tuple(replace(row, split=name) for row in rows if home[row.patient] == name) for name in shares}


def refuse_duplicates(rows: Iterable[CaseRow]) -> None:
    """Raise DataError if two rows have the same id."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise DataError(f"{row.where}: '{row.id}' is already in {seen[row.id]}; drop one, or merge the two masks")
        seen[row.id] = row.where


def _read_ground_truth(row: CaseRow, size: tuple[int, int] | None = None) -> Mask:
    """The mask of the row's object, checked for having any pixel, and against the image's `size` (H, W) if given.

    One that covers the whole image is read, and a warning names it: an inverted or blank export often does.
    """
    path = row.mask
    if path is None:
        raise DataError(f"{row.where}: has no mask")
    where = f"{row.where}: mask {path}" if row.where != str(path) else str(path)
    try:
        mask = read_target(path, row.label)
    except ConfigError as error:  # the label of this row is none
        raise DataError(f"{where}: {error}") from error
    size = size or (int(mask.shape[0]), int(mask.shape[1]))
    if mask.shape == size and not mask.any():
        value = "" if row.label is None else f" (label {row.label})"
        raise EmptyMaskError(
            f"{where}: shows no '{row.object}'{value}; empty its mask cell in a manifest if it is absent"
        )
    if mask.shape != size:
        (height, width), (image_height, image_width) = mask.shape, size
        raise DataError(
            f"{where}: is {width} x {height}, its image {image_width} x {image_height} pixels;"
            " resize the mask with nearest neighbour"
        )
    if mask.all():
        _warn_of_whole(where)
    return mask


@lru_cache(maxsize=4096)  # once, however often a row is decoded
def _warn_of_whole(where: str) -> None:
    log.warning("%s: covers the whole image; look whether it was meant so", where)
