"""MedSegBench: one `<name>_<side>.npz` per data set, with arrays `{split}_images` and `{split}_label`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ibisagent.datasets.members import npz_array, npz_shapes
from ibisagent.datasets.rows import CaseRow
from ibisagent.errors import DataError

SPLITS = ("train", "val", "test")
FILE = re.compile(r"(?P<name>[a-z0-9-]+)_(?P<side>128|256|512)\.npz")

_BINARY = {
    "bbbc010": ("worm", "microscopy"),
    "brifiseg": ("nucleus", "microscopy"),
    "busi": ("breast tumor", "ultrasound"),
    "cellnuclei": ("nucleus", "microscopy"),
    "chasedb1": ("retinal vessel", "fundus"),
    "chuac": ("coronary artery", "X-Ray"),
    "covid19radio": ("lung", "X-Ray"),
    "covidquex": ("COVID-19 infection", "X-Ray"),
    "cystoidfluid": ("cystoid fluid", "OCT"),
    "dca1": ("coronary artery", "X-Ray"),
    "deepbacs": ("bacterium", "microscopy"),
    "drive": ("retinal vessel", "fundus"),
    "dynamicnuclear": ("nucleus", "microscopy"),
    "idrib": ("lesion", "fundus"),
    "isic2016": ("skin lesion", "dermoscopy"),
    "isic2018": ("skin lesion", "dermoscopy"),
    "kvasir": ("polyp", "endoscope"),
    "mosmedplus": ("COVID-19 infection", "CT"),
    "nuclei": ("nucleus", "pathology"),
    "nuset": ("nucleus", "microscopy"),
    "pandental": ("mandible", "X-Ray"),
    "polypgen": ("polyp", "endoscope"),
    "promise12": ("prostate", "MRI"),
    "robotool": ("surgical tool", "endoscope"),
    "tnbcnuclei": ("nucleus", "pathology"),
    "ultrasoundnerve": ("nerve", "ultrasound"),
    "usforkidney": ("kidney", "ultrasound"),
    "uwaterlooskincancer": ("skin lesion", "dermoscopy"),
    "yeaz": ("yeast cell", "microscopy"),
}
"""Name -> (object, modality). The archives say only "foreground"; the words are ours."""
_MULTIPLE = {
    "abdomenus": (
        "ultrasound",
        ("liver", "kidney", "pancreas", "vessel", "adrenal gland", "gallbladder", "bone", "spleen"),
    ),
    "bkai-igh": ("endoscope", ("neoplastic polyp", "non-neoplastic polyp")),
    "fhpsaop": ("ultrasound", ("pubic symphysis", "fetal head")),
    "m2caiseg": (
        "endoscope",
        (
            *("grasper", "bipolar", "hook", "scissors", "clipper", "irrigator", "specimen bag", "trocar", "clip"),
            *("liver", "gallbladder", "fat", "organ", "artery", "intestine", "bile", "blood", "black"),
        ),
    ),
    "monusac": ("pathology", ("epithelial cell", "lymphocyte", "macrophage", "neutrophil", "ambiguous cell")),
    "wbc": ("microscopy", ("cytoplasm", "nucleus")),
}
"""Name -> (modality, objects of the labels 1, 2, ...)."""


def read_archives(files: Iterable[Path]) -> list[CaseRow]:
    """One row for every image and object that it shows, in all splits of all archives.

    Reads all labels, as they say which objects an image shows. DataError for an archive of another structure.
    """
    return [row for file in files for row in _rows(file)]


def _rows(file: Path) -> list[CaseRow]:
    named = FILE.fullmatch(file.name)
    name = named["name"] if named else file.stem
    shapes = npz_shapes(file)
    splits = [split for split in SPLITS if f"{split}_images" in shapes]
    if not splits:
        raise DataError(
            f"{file}: has no array 'train_images', 'val_images' or 'test_images'; see docs/reference/datasets.md"
        )
    rows = []
    for split in splits:
        images, key = shapes[f"{split}_images"], f"{split}_label"
        if shapes.get(key, ())[:3] != images[:3] or len(images) not in (3, 4):
            raise DataError(f"{file}: '{key}' {shapes.get(key)} does not fit '{split}_images' {images}")
        labels = npz_array(file, key)
        for index in range(images[0]):
            present = np.unique(labels[index])
            objects, modality = _objects(name, [int(value) for value in present if value])
            rows += [
                CaseRow(
                    f"{file.name}/{split}/{index}#{thing}",
                    file / f"{split}_images" / str(index),
                    file / key / str(index),
                    thing,
                    f"Segment the {thing}.",
                    label=label,
                    modality=modality,
                    dataset=name,
                    split=split,
                    where=f"{file}, {split} {index}",
                )
                for thing, label in objects.items()
            ]
    return rows


def _objects(name: str, labels: list[int]) -> tuple[Mapping[str, int | None], str]:
    """({object: its label, None for "all that is not 0"}, modality)."""
    if name in _MULTIPLE:
        modality, things = _MULTIPLE[name]
        return {things[label - 1]: label for label in labels if 0 < label <= len(things)}, modality
    if name in _BINARY:
        thing, modality = _BINARY[name]
        return ({thing: None} if labels else {}), modality
    return {f"label {label}": label for label in labels}, ""
