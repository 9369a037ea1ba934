"""Folders and manifests of labelled images as lazy sequences of cases: one case is one image-mask pair.

`read_cases(path)` reads
- a BiomedParseData data set: `<data set>/{split}/<name>_<modality>_<site>.png` with its masks in
  `<data set>/{split}_mask/<name>_<modality>_<site>_<object+name>.png`, blanks in names written as "+", any number of
  masks per image (BiomedParse, Nature Methods 2025, data release);
- a folder of such data sets, with an `index.csv` (a manifest) or without;
- a manifest: a .csv or .jsonl file with the columns of `COLUMNS`, paths relative to the manifest's own folder.

Rows are read and checked at once, pixels only when a case is asked for.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from ibisagent.domain import Case, Image, Mask, check_query
from ibisagent.errors import ConfigError, DataError
from ibisagent.images import read_image, read_masks

COLUMNS: Mapping[str, str] = {
    "image": "file of the image (required)",
    "mask": "file of the mask (required column; an empty cell says that the object is absent)",
    "object": "name of the object (required column; empty only where `answer` is given)",
    "label": "value of the object in a multi-label mask: a number, or a colour that `images.read_masks` knows",
    "query": "what to ask; default 'Segment the {object}.'",
    "answer": "the true answer of a closed question that needs no mask",
    "modality": "CT, MRI, ...",
    "site": "part of the body",
    "dataset": "name of the data set",
    "split": "train, val, test, ...",
    "patient": "who is shown: the unit of splits and of confidence intervals",
    "case": "like `patient`, but only unique within its data set",
    "licence_class": "ok (permissive), nc (non-commercial), unknown",
    "licence": "the licence as stated",
    "area": "share of the picture that the mask covers, in [0, 1]",
    "source_repo": "where it came from (not kept)",
    "height": "pixels (not kept)",
    "width": "pixels (not kept)",
}
INDEX_NAME = "index.csv"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
_REQUIRED = ("image", "mask", "object")


@dataclass(frozen=True, slots=True)
class CaseRow:
    """One image-mask pair before any pixel is read. Texts are "" and `area` is None where nothing is known.

    id: relative image path, "#", object. mask: None where the object is known to be absent, or nothing is to be
    segmented. label: value of the object in a multi-label mask. where: "file, row n" for messages.
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

    @property
    def by_id(self) -> Mapping[str, Case]:
        """The same cases by their id; each look-up decodes."""
        return _CasesById(self)

    def truths(self) -> Iterator[tuple[CaseRow, Mask]]:
        """Every row that has a mask, with its mask (H, W); images are not decoded. DataError as for `decode`."""
        for row in self.rows:
            if row.mask is not None:
                yield row, _read_truth(row, row.mask)

    def decode(self, row: CaseRow) -> Case:
        """The case of one row: reads its image and mask. DataError naming file, row and remedy if they do not fit."""
        last = self._last_image
        image = last[1] if last and last[0] == row.image else read_image(row.image)
        self._last_image = (row.image, image)
        targets: dict[str, Mask] | None = None
        if row.mask is not None:
            targets = {row.object: _read_truth(row, row.mask, image.size)}
        elif row.object:
            targets = {row.object: np.zeros(image.size, dtype=bool)}
        return Case(row.id, image, row.query, targets, answer=row.answer, patient=row.patient, meta=row.meta)


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


def read_cases(
    path: str | Path,
    *,
    split: str | None = None,
    objects: Collection[str] | None = None,
    modalities: Collection[str] | None = None,
    licence_classes: Collection[str] | None = None,
) -> CaseSource:
    """The cases under `path` (see the module's text for the layouts), optionally only some of them.

    Order: that of the manifest, or by data set, split, image and mask name. The files of every row must exist.
    DataError: unknown layout or columns, missing files, duplicate rows, no rows. ConfigError: a filter asks for a
    split, object, modality or licence class that the data do not have.
    """
    path = Path(path)
    source = CaseSource(_read_rows(path), str(path))
    wanted: dict[str, Collection[str] | None] = {
        "split": None if split is None else {split},
        "object": objects,
        "modality": modalities,
        "licence_class": licence_classes,
    }
    kept = source.rows
    for name, values in wanted.items():
        if values is None:
            continue
        known = {getattr(row, name) for row in source.rows}
        if unknown := sorted(set(values) - known):
            have = ", ".join(sorted(known - {""})[:20]) or f"none (give a '{name}' column)"
            raise ConfigError(f"{path}: no row has {name} '{unknown[0]}'; there are: {have}")
        kept = tuple(row for row in kept if getattr(row, name) in values)
    return CaseSource(kept, str(path))


def cases_to_judge(
    path: str | Path, split: str | None = None, limit: int | None = None
) -> tuple[CaseSource, CaseSource]:
    """(all cases under `path`, those of `split`): of "val" if `split` is None and there are any, else all.

    limit: only so many, spread evenly over them. Errors as for `read_cases`.
    """
    everything = read_cases(path)
    if split is None and any(row.split == "val" for row in everything.rows):
        split = "val"
    cases = everything if split is None else read_cases(path, split=split)
    if limit is not None and limit < len(cases):
        step = len(cases) / limit
        cases = CaseSource([cases.rows[int(index * step)] for index in range(limit)], cases.where)
    return everything, cases


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


def _read_rows(path: Path) -> list[CaseRow]:
    if path.is_file():
        return _read_manifest(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; give a data-set folder or a .csv or .jsonl manifest")
    if (path / INDEX_NAME).is_file():
        return _read_manifest(path / INDEX_NAME)
    if _splits(path):
        return _read_data_set(path)
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _splits(folder)]
    if not folders:
        raise DataError(
            f"{path}: holds neither {INDEX_NAME} nor folders like 'train' and 'train_mask';"
            " give a manifest with the columns image, mask, object"
        )
    return [row for folder in folders for row in _read_data_set(folder)]


def _splits(folder: Path) -> list[str]:
    """Names of the splits in one BiomedParseData data set: folders that have a twin named `..._mask`."""
    names = {child.name for child in folder.iterdir() if child.is_dir()}
    return sorted(name for name in names if f"{name}_mask" in names)


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def _read_data_set(folder: Path) -> list[CaseRow]:
    """The pairs of one BiomedParseData data set; images without any mask are no pairs and are left out."""
    name = folder.resolve().name
    rows = []
    for split in _splits(folder):
        images: dict[str, Path] = {}
        for image in _pictures(folder / split):
            if image.stem in images:
                raise DataError(f"{image}: shares its name with {images[image.stem].name}; rename one of the two")
            images[image.stem] = image
        for mask in _pictures(folder / f"{split}_mask"):
            stem = mask.stem
            while stem not in images and "_" in stem:
                stem = stem.rpartition("_")[0]
            thing = mask.stem[len(stem) + 1 :].replace("+", " ").strip()
            if stem not in images or not thing:
                raise DataError(f"{mask}: no image in {folder / split} is called '<image name>_<object>'; rename it")
            facts = [part.replace("+", " ") for part in stem.split("_")]
            modality, site = facts[-2:] if len(facts) >= 3 else ("", "")
            rows.append(
                CaseRow(
                    f"{name}/{split}/{images[stem].name}#{thing}",
                    images[stem],
                    mask,
                    thing,
                    f"Segment the {thing}.",
                    modality=modality,
                    site=site,
                    dataset=name,
                    split=split,
                    where=str(mask),
                )
            )
    rows.sort(key=lambda row: (row.split, row.image.name, row.object))
    _refuse_duplicates(rows)
    return rows


def _read_manifest(path: Path) -> list[CaseRow]:
    readers = {".csv": _csv_records, ".jsonl": _jsonl_records, ".ndjson": _jsonl_records}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: a manifest is a .csv or .jsonl file")
    try:
        rows = [_manifest_row(path, number, record) for number, record in reader(path)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it again as UTF-8") from error
    _refuse_duplicates(rows)
    return rows


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for record in table:
            if None in record or None in record.values():
                raise DataError(f"{path}, row {table.line_num}: has not as many cells as the heading; quote commas")
            yield table.line_num, record


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, row {number}: is not JSON ({error}); write one object per line") from error
            if not isinstance(record, dict) or any(isinstance(value, dict | list) for value in record.values()):
                raise DataError(f"{path}, row {number}: is not a flat JSON object; write one object per line")
            yield number, {name: "" if value is None else str(value) for name, value in record.items()}


def _manifest_row(path: Path, number: int, record: Mapping[str, str]) -> CaseRow:
    where = f"{path}, row {number}"
    if unknown := [name for name in record if name not in COLUMNS]:
        raise DataError(f"{where}: unknown column '{unknown[0]}'; known are: {', '.join(COLUMNS)}")
    if missing := [name for name in _REQUIRED if name not in record]:
        raise DataError(f"{where}: column '{missing[0]}' is missing; required are: {', '.join(_REQUIRED)}")
    cells = {name: record.get(name, "").strip() for name in COLUMNS}
    if not cells["image"]:
        raise DataError(f"{where}: the cell 'image' is empty; name a file")
    if cells["object"]:
        query = cells["query"] or f"Segment the {cells['object']}."
    elif cells["mask"] or not cells["query"] or not cells["answer"]:
        raise DataError(f"{where}: the cell 'object' is empty; name it, or give 'query' and 'answer' and no mask")
    else:
        query = cells["query"]
    try:
        check_query(query)
        area = float(cells["area"]) if cells["area"] else None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    for name in ("image", "mask"):
        if cells[name] and not (path.parent / cells[name]).is_file():
            raise DataError(f"{where}: {name} '{cells[name]}' is not in {path.parent}; correct or drop the row")
    label = cells["label"]
    in_data_set = f"{cells['dataset']}/{cells['case']}" if cells["dataset"] else cells["case"]
    return CaseRow(
        f"{Path(cells['image']).as_posix()}#{cells['object'] or query}",
        path.parent / cells["image"],
        path.parent / cells["mask"] if cells["mask"] else None,
        cells["object"],
        query,
        label=(int(label) if label.isdecimal() else label) if label else None,
        answer=cells["answer"] or None,
        modality=cells["modality"],
        site=cells["site"],
        dataset=cells["dataset"],
        split=cells["split"],
        patient=cells["patient"] or (in_data_set if cells["case"] else ""),
        licence_class=cells["licence_class"],
        licence=cells["licence"],
        area=area,
        where=where,
    )


def _refuse_duplicates(rows: Iterable[CaseRow]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise DataError(f"{row.where}: '{row.id}' is already in {seen[row.id]}; drop one, or merge the two masks")
        seen[row.id] = row.where


def _read_truth(row: CaseRow, path: Path, size: tuple[int, int] | None = None) -> Mask:
    """The mask of the row's object, checked for having any pixel, and against the image's `size` (H, W) if given."""
    where = f"{row.where}: mask {path}" if row.where != str(path) else str(path)
    masks = read_masks(path, None if row.label is None else {row.label: row.object})
    mask = next(iter(masks.values()))
    size = size or (int(mask.shape[0]), int(mask.shape[1]))
    if mask.shape == size and not mask.any():
        value = "" if row.label is None else f" (label {row.label})"
        raise DataError(f"{where}: shows no '{row.object}'{value}; empty its mask cell in a manifest if it is absent")
    if mask.shape != size:
        (height, width), (image_height, image_width) = mask.shape, size
        raise DataError(
            f"{where}: is {width} x {height}, its image {image_width} x {image_height} pixels;"
            " resize the mask with nearest neighbour"
        )
    return mask
