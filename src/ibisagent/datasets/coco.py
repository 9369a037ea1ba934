"""COCO's instance JSON: one case is all instances of a category in an image, as one mask."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ibisagent.datasets.members import coco_index, read_json
from ibisagent.datasets.rows import CaseRow, split_kind
from ibisagent.errors import DataError

log = logging.getLogger(__name__)


def is_instances(loaded: Any) -> bool:
    """Whether a decoded JSON file is COCO's: images, annotations and categories."""
    return isinstance(loaded, dict) and {"images", "annotations", "categories"} <= loaded.keys()


def read_instances(file: Path) -> list[CaseRow]:
    """One row for every image and category that it shows.

    Regions with `iscrowd` are masks where a pair has no others: so CVAT writes all its run lengths. Beside other
    instances such a region is COCO's, to be ignored, which a union cannot: these pairs are left out, and a warning says
    how many. Images are looked for beside the file, in `images`, and in a folder named as the split, there and one
    folder up. The split is that of the file's name, or of its folder's.
    """
    loaded = read_json(file)
    images, parts = coco_index(file)
    try:
        categories = {int(category["id"]): str(category["name"]) for category in loaded["categories"]}
        split = file.stem.removeprefix("instances_").removeprefix("_annotations.coco") or file.resolve().parent.name
        folders = [file.parent / name for name in ("", "images", split, f"images/{split}")]
        folders += [file.parent.parent / name for name in ("images", split, f"images/{split}")]
        rows = []
        crowds = 0
        for (image_id, category), annotations in sorted(parts.items()):
            if len({bool(annotation.get("iscrowd")) for annotation in annotations}) > 1:
                crowds += 1
                continue
            thing, name = categories[category].replace("_", " "), str(images[image_id]["file_name"]).replace("\\", "/")
            image = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if image is None:
                raise DataError(f"{file}: image '{name}' is not in {', '.join(str(f) for f in folders[:3])}")
            rows.append(
                CaseRow(
                    f"{name}#{thing}",
                    image,
                    file / str(image_id) / str(category),
                    thing,
                    f"Segment the {thing}.",
                    dataset=file.resolve().parent.name,
                    split=split if split_kind(split) else "",
                    where=f"{file}, image {image_id}",
                )
            )
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: is not COCO's instance JSON ({error!r}); see docs/reference/datasets.md") from error
    if crowds:
        log.warning("%s: %d pairs left out: they have a crowd region (iscrowd) beside other instances", file, crowds)
    return rows
