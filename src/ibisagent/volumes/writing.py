"""Masks of a volume to files on the source's exact grid, and back: NIfTI, PNG stack, COCO run lengths.

DICOM segmentations and reports are written by `dicom_output`, structure sets by `rtstruct`, label maps by `label_maps`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.errors import DataError
from ibisagent.files import appearing_whole, reading, unfinished_folder, write_json
from ibisagent.imaging.images import read_masks, write_mask_png
from ibisagent.imaging.masks import decode_rle, encode_rle
from ibisagent.volumes.grid import NiftiOrigin, Volume, places_off_mm, scratch_mask
from ibisagent.volumes.headers import SEGMENTATIONS, STRUCTURE_SET, is_of_class
from ibisagent.volumes.label_maps import SEGMENTATION, label_names

RLE_FORMAT = "ibisagent volume masks"
_MOST_LABELS = 1000  # of an atlas; an image of grey values has more, or negative ones
_GRID_FILE = "grid.json"
_SLICE = re.compile(r"slice-(\d+)\.png")
_NAMING_FIELDS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
"""Free text of a NIfTI header, in which scanners and converters leave names and dates."""


def write_nifti(mask: np.ndarray, volume: Volume, path: Path) -> None:
    """Write an (I, J, K) bool mask as .nii or .nii.gz, 1 inside; affine and header are the source's if that was NIfTI.

    Free text and extensions of the header are left out, since they may name the patient. DataError for slices at uneven
    distances, which NIfTI cannot place.
    """
    write_nifti_values(mask.astype(np.uint8), volume, path, highest=1)


def write_nifti_values(values: np.ndarray, volume: Volume, path: Path, *, highest: int) -> None:
    """Write an (I, J, K) uint8 array as `write_nifti` does; highest: the value that viewers show as brightest."""
    import nibabel as nib

    _check_grid(values, volume, str(path))
    check_nifti(volume)
    header, affine = None, volume.affine
    if isinstance(volume.origin, NiftiOrigin):
        header, affine = volume.origin.header.copy(), volume.origin.affine
        header.extensions.clear()
        for field in _NAMING_FIELDS:
            if field in header:
                header[field] = b""
    large = max(values.shape) > 32_767 or (header is not None and "Nifti2" in type(header).__name__)
    image = (nib.Nifti2Image if large else nib.Nifti1Image)(values, affine, header)
    image.header.set_data_dtype(np.uint8)
    image.header["cal_min"], image.header["cal_max"] = 0, highest
    if header is None:
        image.header.set_xyzt_units("mm")
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    with appearing_whole(path, suffix) as part:
        nib.save(image, part)


def check_nifti(volume: Volume) -> None:
    """DataError where NIfTI cannot hold masks of `volume`."""
    if volume.heights is not None:
        raise DataError(
            f"{volume.name}: its slices are unevenly spaced, which NIfTI cannot say; ask for --format seg, png or rle"
        )


def write_png_stack(mask: np.ndarray, volume: Volume, folder: Path) -> None:
    """Write an (I, J, K) bool mask as slice-0000.png, ... per k, rows j and columns i, with the grid in grid.json.

    An older stack of that name is replaced.
    """
    _check_grid(mask, volume, str(folder))
    try:
        with unfinished_folder(folder.parent, folder.name) as part:
            for k in range(volume.shape[2]):
                write_mask_png(np.ascontiguousarray(mask[:, :, k].T).astype(bool), part / f"slice-{k:04d}.png")
            write_json(_grid(volume), part / _GRID_FILE)
            if (folder / _GRID_FILE).is_file():
                shutil.rmtree(folder)
            os.replace(part, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error


def write_rle(masks: Mapping[str, np.ndarray], volume: Volume, path: Path) -> None:
    """Write masks as JSON: the grid, and for each target the slices k that show it as COCO run lengths (rows j)."""
    for mask in masks.values():
        _check_grid(mask, volume, str(path))
    coded = {
        name: [
            {"slice": k, "rle": encode_rle(np.ascontiguousarray(mask[:, :, k].T).astype(bool))}
            for k in range(volume.shape[2])
            if mask[:, :, k].any()
        ]
        for name, mask in masks.items()
    }
    content = {"format": RLE_FORMAT, "version": 1, **_grid(volume), "masks": coded}
    write_json(content, path)


def read_volume_masks(path: str | Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Masks by name, (I, J, K) bool, and their affine, from what this package wrote, or any mask ("mask") or label map.

    The objects of a label map are called as the files beside it say (`label_maps`), else by their number. Raises
    DataError for anything else.
    """
    path = Path(path)
    if path.is_dir() and (path / _GRID_FILE).is_file():
        return _read_png_stack(path)
    if path.suffix.lower() == ".json":
        return _read_rle(path)
    from ibisagent.volumes import read_volume

    if path.name.lower().endswith(SEGMENTATION):
        from ibisagent.volumes.itk import read_slicer_segmentation

        return read_slicer_segmentation(path)
    volume = read_volume(path)
    values = volume.values(np.asarray(volume.voxels))
    inside = np.unique(values[values != 0])
    names = label_names(path)
    if volume.coloured or len(inside) > _MOST_LABELS or not ((inside > 0) & (inside % 1 == 0)).all():
        raise DataError(f"{path}: is neither a mask nor a label map; save it with whole numbers, 0 outside")
    if not names and len(inside) < 2:
        return {"mask": values != 0}, volume.affine
    numbers = sorted({*names, *(int(value) for value in inside)})  # what is named and not there is an empty mask
    return {names.get(number, str(number)): values == number for number in numbers}, volume.affine


def masks_on(volume: Volume, path: str | Path) -> dict[str, np.ndarray]:
    """Masks of a file by name on the grid of `volume`; DICOM segmentations and structure sets too.

    Axes that run the other way or stand in another order are turned, which changes no voxel. DataError if size or place
    differ otherwise: a mask is never resampled.
    """
    from ibisagent.volumes import is_volume
    from ibisagent.volumes.rtstruct import read_rtstruct
    from ibisagent.volumes.segmentations import read_segmentation

    path = Path(path)
    if path.is_file() and is_volume(path) and is_of_class(path, *SEGMENTATIONS):
        return read_segmentation(path, volume)
    if path.is_file() and is_volume(path) and is_of_class(path, STRUCTURE_SET):
        return read_rtstruct(path, volume)
    masks, affine = read_volume_masks(path)
    if volume.oriented:
        masks, affine = _turned(masks, affine, volume.affine)
    for mask in masks.values():
        _check_grid(mask, volume, str(path))
    off = places_off_mm(affine, volume.affine, volume.shape)
    if volume.oriented and off > volume.tolerance_mm:
        raise DataError(f"{path}: lies up to {off:.2f} mm beside {volume.name}; resample the mask onto its grid")
    return masks


def _turned(
    masks: Mapping[str, np.ndarray], affine: np.ndarray, onto: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Masks (I, J, K) of `affine` with axes flipped and exchanged to run as those of the affine `onto`, and theirs."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    turn = io_orientation(np.linalg.inv(onto) @ affine)
    if np.isnan(turn).any():
        return dict(masks), affine
    shape = next(iter(masks.values())).shape if masks else (1, 1, 1)
    return {name: apply_orientation(mask, turn) for name, mask in masks.items()}, affine @ inv_ornt_aff(turn, shape)


def _check_grid(mask: np.ndarray, volume: Volume, where: str) -> None:
    if mask.shape != volume.shape:
        sizes = " and ".join(" x ".join(map(str, shape)) for shape in (mask.shape, volume.shape))
        raise DataError(f"{where}: mask and volume {volume.name} have {sizes} voxels; resample the mask onto its grid")


def _grid(volume: Volume) -> dict[str, Any]:
    uneven = {} if volume.heights is None else {"slice_mm": list(volume.heights)}
    return {
        "shape": list(volume.shape),
        "affine": volume.affine.tolist(),
        "axes": "slices k, rows j, columns i",
        **uneven,
    }


def _read_grid(content: Any, path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    with reading(path, "write it again"):
        first, second, third = (int(side) for side in content["shape"])
        affine = np.array(content["affine"], dtype=np.float64)
        if affine.shape != (4, 4) or min(first, second, third) < 1:
            raise ValueError("the grid is none")
    return (first, second, third), affine


def _load(path: Path) -> Any:
    with reading(path, "write it again"):
        return json.loads(path.read_bytes())


def _read_png_stack(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    shape, affine = _read_grid(_load(folder / _GRID_FILE), folder)
    files = {int(match[1]): file for file in folder.iterdir() if (match := _SLICE.fullmatch(file.name))}
    if sorted(files) != list(range(shape[2])):
        raise DataError(f"{folder}: holds {len(files)} of {shape[2]} slices; copy it again")
    mask = scratch_mask(shape)
    for k, file in files.items():
        plane = read_masks(file)["mask"].T
        if plane.shape != shape[:2]:
            raise DataError(f"{file}: is {plane.shape[0]} x {plane.shape[1]}, expected {shape[0]} x {shape[1]} pixels")
        mask[:, :, k] = plane
    return {"mask": mask}, affine


def _read_rle(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    content = _load(path)
    if not isinstance(content, dict) or content.get("format") != RLE_FORMAT:
        raise DataError(f"{path}: holds no masks of a volume; give a file that 'ibisagent segment' wrote")
    shape, affine = _read_grid(content, path)
    masks: dict[str, np.ndarray] = {}
    try:
        for name, slices in content["masks"].items():
            masks[name] = scratch_mask(shape)
            for coded in slices:
                masks[name][:, :, int(coded["slice"])] = decode_rle(coded["rle"]).T
    except DataError as error:  # or TooLargeError
        raise type(error)(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: is damaged ({error}); write it again") from error
    return masks, affine
