"""Label maps: one file in which each object has a number, with names, codes and colours beside it.

| files | read by |
|---|---|
| `NAME.nii.gz` with `NAME.json` | programs; the JSON says name, code and colour of each number |
| `NAME.txt` beside it | ITK-SNAP, as its label descriptions |
| `NAME.seg.nrrd` | 3D Slicer, as a segmentation with names, colours and terminology |

In NIfTI a voxel has one number: where objects overlap, the one with fewer voxels (the tumor, not the liver) has it, and
the JSON says how many voxels the other lost. `.seg.nrrd` keeps overlapping objects whole, in layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ibisagent.errors import ConfigError, DataError
from ibisagent.files import appearing_whole, one_line, reading, write_whole
from ibisagent.query import target_of
from ibisagent.volumes.grid import LPS, Volume, scratch
from ibisagent.volumes.terms import Term, colours, term

LABEL_MAP, BESIDE = ".nii.gz", (".json", ".txt")
"""How the file that `write_label_map` writes ends, and those that it writes beside it."""

SEGMENTATION = ".seg.nrrd"
_MOST_LABELS = 255
_SNAP_LINE = re.compile(r'\s*(\d+)(?:\s+[\d.]+){6}\s+"(.*)"\s*')


def write_label_map(masks: Mapping[str, np.ndarray], volume: Volume, path: Path) -> None:
    """Write (I, J, K) bool masks as one label map on the volume's grid, with its names in the files BESIDE it.

    path: ends with LABEL_MAP.
    Objects are numbered 1, 2, ... in their order. Raises DataError as `write_nifti` does.
    """
    from ibisagent.volumes.writing import write_nifti_values

    _check_count(masks, path)
    labels = scratch(volume.shape, np.uint8)
    numbers = {name: number for number, name in enumerate(masks, start=1)}
    sizes = {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}
    for name in sorted(masks, key=lambda name: sizes[name], reverse=True):
        labels[masks[name]] = numbers[name]
    write_nifti_values(labels, volume, path, highest=len(masks))
    kept = np.bincount(labels.reshape(-1), minlength=len(masks) + 1)
    chosen = colours(masks)
    described = [
        {
            "value": number,
            "name": name,
            "colour": "#" + bytes(chosen[name]).hex(),
            **_codes(term(name)),
            "voxels": int(kept[number]),
            "voxels_given_to_smaller_objects": sizes[name] - int(kept[number]),
        }
        for name, number in numbers.items()
    ]
    content = (json.dumps({"labels": described}, indent=1) + "\n").encode()
    write_whole(content, _beside(path)[0])
    lines = ['    0     0    0    0        0  0  0    "Clear Label"']
    for name, number in numbers.items():
        red, green, blue = chosen[name]
        plain = one_line(name).replace('"', "'")
        lines.append(f'{number:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{plain}"')
    write_whole(("\n".join(lines) + "\n").encode(), _beside(path)[1])


def write_slicer_segmentation(masks: Mapping[str, np.ndarray], volume: Volume, path: Path) -> None:
    """Write (I, J, K) bool masks as 3D Slicer's `.seg.nrrd`: in one layer, or a layer each where any two overlap.

    Raises ConfigError without slicerio, DataError where the disk is full.
    """
    try:
        import slicerio
    except ImportError as error:
        raise ConfigError(f"{path.name}: needs slicerio: pip install 'ibisagent[medical]'") from error
    _check_count(masks, path)
    chosen, parts = colours(masks), list(masks.values())
    covered = scratch(volume.shape, np.uint8)
    for mask in parts:
        covered += mask
    layered = bool((covered > 1).any())
    voxels = scratch((len(parts) if layered else 1, *volume.shape), np.uint8)
    for number, mask in enumerate(parts):
        voxels[number if layered else 0][mask] = 1 if layered else number + 1
    segments = [
        {
            "id": f"Segment_{number + 1}",
            "name": one_line(name),
            "color": [round(part / 255, 6) for part in chosen[name]],
            "layer": number if layered else 0,
            "labelValue": 1 if layered else number + 1,
            "terminology": _terminology(term(name)),
        }
        for number, name in enumerate(masks)
    ]
    content = {
        "voxels": voxels if layered else voxels[0],
        "ijkToLPS": LPS @ volume.affine,
        "containedRepresentationNames": ["Binary labelmap", "Closed surface"],
        "segments": segments,
    }
    with appearing_whole(path, SEGMENTATION) as part:
        slicerio.write_segmentation(str(part), content, compression_level=6)


def label_names(path: Path) -> dict[int, str]:
    """The names of the numbers of a NIfTI label map, from the JSON or ITK-SNAP's labels beside it; {} without either.

    DataError for a file beside it that is damaged.
    """
    described, snap = _beside(path)
    with reading(described if described.is_file() else snap, "mend or remove it"):
        if described.is_file():
            loaded = json.loads(described.read_bytes())
            if isinstance(loaded, dict) and "labels" in loaded:
                return {int(label["value"]): str(label["name"]) for label in loaded["labels"]}
        if snap.is_file():
            lines = (
                _SNAP_LINE.fullmatch(line) for line in snap.read_text(encoding="utf-8", errors="replace").splitlines()
            )
            return {int(line[1]): line[2] for line in lines if line and line[1] != "0"}
    return {}


def choose_label(masks: Mapping[str, np.ndarray], label: str, where: object) -> np.ndarray:
    """The mask called `label`, in whatever case. DataError naming those that are there."""
    for name, mask in masks.items():
        if name.casefold() == label.strip().casefold():
            return mask
    listed = one_line(", ".join(f"'{name}'" for name in masks), 400)
    raise DataError(f"{where}: has no label '{one_line(label, 60)}'; it holds {listed}")


def choose_start(
    masks: Mapping[str, np.ndarray], query: str, label: str | None, where: object
) -> dict[str, np.ndarray]:
    """Of the masks of a file those to refine for `query`, by the name of what they are to become.

    label: the one that is meant. None: the only one, else those whose names the query holds; DataError where it holds
    none of them.
    """
    if label is not None:
        return {target_of(query): choose_label(masks, label, where)}
    if len(masks) == 1:
        return {target_of(query): mask for mask in masks.values()}
    named = {name: mask for name, mask in masks.items() if name.casefold() in query.casefold()}
    if not named:
        listed = one_line(", ".join(f"'{name}'" for name in masks), 300)
        raise DataError(f"{where}: holds {len(masks)} objects: {listed}; say which one to refine with --label")
    return named


def _beside(path: Path) -> tuple[Path, Path]:
    base = path.name.removesuffix(".gz").removesuffix(".nii")
    return path.with_name(base + BESIDE[0]), path.with_name(base + BESIDE[1])


def _check_count(masks: Mapping[str, np.ndarray], path: Path) -> None:
    if len(masks) > _MOST_LABELS:
        raise DataError(f"{path}: {len(masks)} objects, a label map numbers {_MOST_LABELS}; write one mask for each")


def _codes(known: Term) -> dict[str, object]:
    parts = {"category": known.category, "type": known.kind, "modifier": known.modifier, "region": known.region}
    return {name: asdict(code) for name, code in parts.items() if code is not None} if known.known else {}


def _terminology(known: Term) -> dict[str, object]:
    """As 3D Slicer keeps it: triplets of scheme, value, meaning."""
    parts = {
        "category": known.category,
        "type": known.kind,
        "typeModifier": known.modifier,
        "anatomicRegion": known.region,
    }
    triplets: dict[str, object] = {
        name: [code.scheme, code.value, code.meaning] for name, code in parts.items() if code is not None
    }
    return {
        "contextName": "Segmentation category and type - DICOM master list",
        "anatomicContextName": "Anatomic codes - DICOM master list",
        **triplets,
    }
