"""Medical Segmentation Decathlon: `dataset.json`, volumes in `imagesTr`, label maps on the same grid in `labelsTr`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ibisagent.datasets.members import read_json
from ibisagent.datasets.rows import CaseRow
from ibisagent.errors import DataError
from ibisagent.volumes import SliceView, read_volume

INDEX = "dataset.json"
AXIS = "axial"


def read_task(folder: Path) -> list[CaseRow]:
    """One row for every axial slice and object that it shows; patient: the volume.

    The test volumes have no public labels and are no cases. Every label map is read once, to find the slices. Of
    multiple channels on one grid the first is shown. DataError for another structure, or labels on another grid.
    """
    index = folder / INDEX
    task = read_json(index)
    try:
        names = {int(value): str(name) for value, name in _labels(task["labels"]).items() if int(value)}
        pairs = [(folder / pair["image"], folder / pair["label"]) for pair in task["training"]]
        modality = str(next(iter(task.get("modality", task.get("channel_names", {"0": ""})).values())))
        name = str(task.get("name", "")) or folder.resolve().name
        licence = str(task.get("licence", task.get("license", "")))
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise DataError(
            f"{index}: is not the index of a Decathlon task ({error!r}); see docs/reference/datasets.md"
        ) from error
    rows = []
    for image, labels in pairs:
        for kind, file in (("image", image), ("label map", labels)):
            if not file.is_file():
                raise DataError(f"{index}: {kind} '{file.name}' is not in {file.parent}; download the task again")
        rows += _slices(image, labels, names, folder, dataset=name, modality=modality, licence=licence)
    return rows


def _labels(labels: object) -> dict[str, str]:
    """{"1": "liver"}; nnU-Net writes {"liver": 1}."""
    if not isinstance(labels, dict):
        raise TypeError("labels")
    return (
        {str(key): value for key, value in labels.items()}
        if all(str(key).isdecimal() for key in labels)
        else {str(value): key for key, value in labels.items()}
    )


def _slices(
    image: Path, labels: Path, names: dict[int, str], folder: Path, *, dataset: str, modality: str, licence: str
) -> list[CaseRow]:
    import nibabel

    volume = read_volume(labels)
    header = nibabel.load(image)
    if tuple(header.shape[:3]) != volume.shape or not np.allclose(header.affine, volume.affine, atol=1e-2):
        raise DataError(f"{labels}: lies on another grid than {image}; download the task again")
    view = SliceView(volume, AXIS)
    patient = image.name.removesuffix(".gz").removesuffix(".nii")
    where = image.relative_to(folder).as_posix()
    rows = []
    for value, thing in names.items():
        chosen = volume.voxels == value
        rows += [
            CaseRow(
                f"{where}/{AXIS}/{index}#{thing}",
                image / AXIS / str(index),
                labels / AXIS / str(index),
                thing,
                f"Segment the {thing}.",
                label=value,
                modality=modality,
                dataset=dataset,
                split="train",
                patient=f"{dataset}/{patient}",
                licence=licence,
                where=f"{labels}, {AXIS} slice {index}",
            )
            for index in range(view.count)
            if view.voxels_of(chosen, index).any()
        ]
    rows.sort(key=lambda row: (int(row.image.name), row.object))
    return rows
