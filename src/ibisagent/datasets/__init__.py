"""Labelled images as lazy sequences of cases: one case is one image-mask pair.

`read_cases(path)` reads
- a BiomedParseData data set: `<data set>/{split}/<name>_<modality>_<site>.png` with its masks in
  `<data set>/{split}_mask/<name>_<modality>_<site>_<object+name>.png`, blanks in names written as "+", any number of
  masks per image (BiomedParse, Nature Methods 2025, data release); with `{split}.json`, the pairs that it lists;
- a folder of such data sets, with an `index.csv` (a manifest) or without;
- a manifest: a .csv or .jsonl file with the columns of `COLUMNS`, paths relative to the manifest's own folder;
- MedSegBench: an .npz archive, or a folder of them; a Medical Segmentation Decathlon task: a folder with
  `dataset.json`; COCO's instance JSON; SA-Med2D-20M: a folder with `SAMed2D_v1.json`; MeCoVQA: its JSON files.
`catalogue` says of each where it comes from and by which rules it is scored; `leaks` compares two of them.

Rows are read and checked at once, pixels only when a case is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from ibisagent.datasets import biomedparse, coco, decathlon, medsegbench, samed2d
from ibisagent.datasets.biomedparse import IMAGE_SUFFIXES
from ibisagent.datasets.manifests import COLUMNS, read_manifest
from ibisagent.datasets.members import read_json
from ibisagent.datasets.rows import CaseRow, CaseSource, EmptyMaskError, refuse_duplicates, split_by_patient, split_kind
from ibisagent.errors import ConfigError, DataError

__all__ = [
    "COLUMNS",
    "IMAGE_SUFFIXES",
    "INDEX_NAME",
    "CaseRow",
    "CaseSource",
    "EmptyMaskError",
    "Layout",
    "cases_to_judge",
    "layout_of",
    "read_cases",
    "split_by_patient",
    "split_kind",
]

log = logging.getLogger(__name__)

INDEX_NAME = "index.csv"
Layout = str
"""What kind of data set a path is: "manifest", or the name of an entry of `catalogue.BENCHMARKS`."""
_DEPTH = 2  # BiomedParseData keeps some data sets one folder further down: MSD/Task09_Spleen


def read_cases(
    path: str | Path,
    *,
    split: str | None = None,
    objects: Collection[str] | None = None,
    modalities: Collection[str] | None = None,
    licence_classes: Collection[str] | None = None,
) -> CaseSource:
    """The cases under `path` (see the module's text for the layouts), optionally only some of them.

    split: "train", "val" and "test" mean all rows of that kind, whatever the data call it (`split_kind`); any other
    name means itself. Order: that of the manifest, or by data set, split, image and mask name. The files of every row
    must exist.
    DataError: unknown layout or columns, missing files, duplicate rows, no rows. ConfigError: a filter asks for a
    split, object, modality or licence class that the data do not have.
    """
    path = Path(path)
    source = CaseSource(_read_rows(path), str(path))
    of_kind = {row.split for row in source.rows if split is not None and split_kind(row.split) == split}
    wanted: dict[str, Collection[str] | None] = {
        "split": None if split is None else of_kind or {split},
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
    """(all cases under `path`, those of `split`).

    split None: the rows for validation where there are any, else those for testing, by any of their usual names, else
    all that are not for training; a warning names what was left out. limit: only so many, spread evenly over them.
    Errors as for `read_cases`; ConfigError where split is None and all rows are for training.
    """
    everything = read_cases(path)
    if split is not None:
        return everything, read_cases(path, split=split).spread(limit)
    kinds = {split_kind(row.split) for row in everything.rows}
    if kinds == {"train"}:
        raise ConfigError(f"{path}: all rows are for training; give --split {everything.rows[0].split} to take them")
    kind = next((kind for kind in ("val", "test") if kind in kinds), "")
    cases = everything.filter(lambda row: split_kind(row.split) == kind)
    if len(cases) < len(everything):
        names = ", ".join(sorted({row.split or "none" for row in cases.rows}))
        log.warning("%s: split %s: %d of %d rows; --split takes another", path, names, len(cases), len(everything))
    return everything, cases.spread(limit)


def layout_of(path: Path) -> Layout:
    """Which reader `read_cases` takes for `path`. DataError for nothing that it knows."""
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".npz":
            return "medsegbench"
        if suffix == ".json":
            loaded = read_json(path)
            if samed2d.is_questions(loaded):
                return "mecovqa"
            if coco.is_instances(loaded):
                return "coco"
            raise DataError(f"{path}: is neither COCO's instance JSON nor MeCoVQA's; see docs/reference/datasets.md")
        return "manifest"
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; give a data-set folder or a .csv or .jsonl manifest")
    marks = {INDEX_NAME: "manifest", samed2d.PAIRS: "samed2d", decathlon.INDEX: "msd"}
    for name, layout in marks.items():
        if (path / name).is_file():
            return layout
    if any(medsegbench.FILE.fullmatch(file.name) for file in path.iterdir()):
        return "medsegbench"
    if _data_sets(path):
        return "biomedparse"
    raise DataError(
        f"{path}: holds neither {INDEX_NAME} nor folders like 'train' and 'train_mask';"
        " give a manifest with the columns image, mask, object"
    )


def _read_rows(path: Path) -> list[CaseRow]:
    layout = layout_of(path)
    if layout == "manifest":
        return read_manifest(path if path.is_file() else path / INDEX_NAME)
    if layout == "medsegbench":
        inside = [] if path.is_file() else sorted(path.iterdir())
        archives = [path] if path.is_file() else [file for file in inside if medsegbench.FILE.fullmatch(file.name)]
        return medsegbench.read_archives(archives)
    if layout == "biomedparse":
        return [row for name, folder in _data_sets(path).items() for row in biomedparse.read_data_set(folder, name)]
    readers = {
        "msd": decathlon.read_task,
        "samed2d": samed2d.read_images,
        "coco": coco.read_instances,
        "mecovqa": samed2d.read_questions,
    }
    rows = readers[layout](path)
    refuse_duplicates(rows)
    return rows


def _data_sets(path: Path) -> dict[str, Path]:
    """BiomedParseData's data sets at or below `path`, by name."""
    if biomedparse.splits(path):
        return {path.resolve().name: path}
    found: dict[str, Path] = {}
    level = {"": path}
    for _ in range(_DEPTH):
        inside = {
            f"{name}/{child.name}".strip("/"): child
            for name, folder in level.items()
            for child in sorted(folder.iterdir())
            if child.is_dir()
        }
        found |= {name: folder for name, folder in inside.items() if biomedparse.splits(folder)}
        level = {name: folder for name, folder in inside.items() if name not in found}
    return dict(sorted(found.items()))
