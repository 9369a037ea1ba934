"""Manifests: a .csv or .jsonl file with one image-mask pair a row, paths relative to the manifest's own folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ibisagent.datasets.rows import CaseRow, refuse_duplicates
from ibisagent.domain import check_query
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import plain_cell

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
    "area": "share of the image that the mask covers, in [0, 1]",
    "source_repo": "where it came from (not kept)",
    "height": "pixels (not kept)",
    "width": "pixels (not kept)",
}
_REQUIRED = ("image", "mask", "object")


def read_manifest(path: Path) -> list[CaseRow]:
    """The rows of a manifest. DataError naming file, row and remedy."""
    readers = {".csv": _csv_records, ".jsonl": _jsonl_records, ".ndjson": _jsonl_records}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: a manifest is a .csv or .jsonl file")
    try:
        rows = [_manifest_row(path, number, record) for number, record in reader(path)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it again as UTF-8") from error
    refuse_duplicates(rows)
    return rows


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for record in table:
            if None in record or None in record.values():
                raise DataError(f"{path}, row {table.line_num}: has not as many cells as the heading; quote commas")
            yield table.line_num, {name: plain_cell(cell) for name, cell in record.items()}


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
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
    except (ConfigError, ValueError) as error:
        raise DataError(f"{where}: {error}") from error
    for name in ("image", "mask"):
        place = path.parent / cells[name]
        if cells[name] and not (place.is_file() or (name == "image" and place.is_dir())):  # a DICOM series is a folder
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
