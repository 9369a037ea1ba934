"""SA-Med2D-20M, and MeCoVQA-G and G+ (MedPLIB), whose questions are about its images.

Names: `images/<modality>_<sequence>--<data set>--<case>--<slice>.png` and
`masks/<the same>--<class id>_<instance>.png`; the JSON files beside them pair images with masks and ids with names.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ibisagent.datasets.members import read_json
from ibisagent.datasets.rows import CaseRow
from ibisagent.errors import DataError
from ibisagent.query import target_of

PAIRS, CLASSES = "SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"
_MODALITIES = {
    "ct": "CT",
    "mr": "MRI",
    "pet": "PET",
    "x": "X-Ray",
    "us": "ultrasound",
    "ultrasound": "ultrasound",
    "dermoscopy": "dermoscopy",
    "endoscopy": "endoscope",
    "fundus": "fundus",
    "microscopy": "microscopy",
}
_MASK = re.compile(r"<mask>\s*(.*?)\s*</mask>", re.DOTALL)
_MARKS = re.compile(r"<image>|<im_start>|<im_end>")


def read_images(folder: Path) -> list[CaseRow]:
    """One row for every image and class; the instances of a class are one mask. DataError for another structure."""
    names = _class_names(folder)
    rows = []
    try:
        for image, masks in read_json(folder / PAIRS).items():
            by_class: dict[str, list[str]] = {}
            for mask in masks:
                by_class.setdefault(_class_of(Path(mask).stem), []).append(mask)
            for code, parts in sorted(by_class.items()):
                thing = names.get((_set_of(image), code), f"class {code}")
                rows.append(_row(folder, image, _joined(sorted(parts)), thing, f"Segment the {thing}.", folder / PAIRS))
    except (AttributeError, TypeError, IndexError) as error:
        raise DataError(f"{folder / PAIRS}: is not that of SA-Med2D ({error!r}); download it again") from error
    return rows


def is_questions(loaded: Any) -> bool:
    """Whether a decoded JSON file is MeCoVQA's: a list of conversations about images."""
    return isinstance(loaded, list) and bool(loaded) and {"image", "conversations"} <= set(loaded[0])


def read_questions(file: Path) -> list[CaseRow]:
    """One row for every answer with a mask in a MeCoVQA file; questions without one are no cases.

    Images are looked for beside the file, in `SAMed2Dv1` there, and the same one and two folders up.
    """
    roots = [parent / name for parent in list(file.parents)[:3] for name in ("", "SAMed2Dv1")]
    rows: list[CaseRow] = []
    seen: dict[str, int] = {}
    names_of: dict[Path, dict[tuple[str, str], str]] = {}
    try:
        for number, item in enumerate(read_json(file)):
            root = next((root for root in roots if (root / item["image"]).is_file()), None)
            if root is None:
                raise DataError(f"{file}, item {number}: no image '{item['image']}' beside it; link SAMed2Dv1 there")
            if root not in names_of:
                names_of[root] = _class_names(root)
            names, asked = names_of[root], ""
            for said in item["conversations"]:
                if said["from"] == "human":
                    asked = " ".join(_MARKS.sub(" ", said["value"]).split())
                    continue
                for mask in _MASK.findall(said["value"]):
                    if not (root / mask).is_file():
                        raise DataError(
                            f"{file}, item {number}: mask '{mask}' is not in {root}; see docs/reference/datasets.md"
                        )
                    thing = names.get((_set_of(item["image"]), _class_of(Path(mask).stem))) or target_of(asked)
                    row = _row(root, item["image"], mask, thing, asked, file, split=_split_of(file))
                    seen[row.id] = seen.get(row.id, 0) + 1
                    rows.append(row if seen[row.id] == 1 else replace(row, id=f"{row.id}#{seen[row.id]}"))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{file}: is not a list of MeCoVQA's conversations ({error!r}); download it again") from error
    return rows


def _row(root: Path, image: str, mask: str, thing: str, query: str, where: Path, *, split: str = "") -> CaseRow:
    stem = Path(image).stem
    parts = stem.split("--")
    patient = "--".join(parts[1:3]) if len(parts) >= 4 else ""
    kind = parts[0].split("_")[0]
    return CaseRow(
        f"{image}#{thing}",
        root / image,
        root / mask,
        thing,
        query,
        modality=_MODALITIES.get(kind.lower(), kind),
        dataset=parts[1] if len(parts) >= 4 else "SA-Med2D",
        split=split,
        patient=patient,
        where=f"{where}, {image}",
    )


def _split_of(file: Path) -> str:
    return next((split for split in ("train", "val", "test") if split in (file.parent.name, *file.stem.split("_"))), "")


def _set_of(image: str) -> str:
    return Path(image).name.split("--")[1] if Path(image).name.count("--") >= 3 else ""


def _class_of(mask_stem: str) -> str:
    """The class id of a mask: "0003" of "...--0003_000"."""
    return mask_stem.rpartition("--")[2].partition("_")[0]


def _joined(masks: list[str]) -> str:
    """The address of the union of multiple instances (see `members`)."""
    if len(masks) == 1:
        return masks[0]
    numbers = [Path(mask).stem.rpartition("_")[2] for mask in masks]
    first = Path(masks[0])
    start = first.stem.rpartition("_")[0]
    return first.with_name(f"{start}_{'+'.join(numbers)}{first.suffix}").as_posix()


def _class_names(root: Path) -> dict[tuple[str, str], str]:
    """{(data set, class id): name}; empty where the mapping is not there."""
    if not (root / CLASSES).is_file():
        return {}
    listed = read_json(root / CLASSES)
    try:
        return {
            (dataset, f"{int(code):04d}"): name.replace("_", " ")
            for dataset, classes in listed.items()
            for name, code in classes.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{root / CLASSES}: is not that of SA-Med2D ({error!r}); download it again") from error
