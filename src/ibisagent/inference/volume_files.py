"""What comes of a volume: masks in the formats asked for, measurements, an overview, and the record of the run.

File names and records hold neither path nor patient: they begin with the volume's own name, which for DICOM is made
from a hash. DICOM objects (`seg`, `sr`, `rtstruct`) carry the patient of their source, as DICOM demands.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ibisagent.domain import Episode, Image
from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.files import safe_name, unfinished_folder, write_json
from ibisagent.imaging.images import write_png
from ibisagent.inference.volume import VolumeSegmentation, Why
from ibisagent.protocol import overlay
from ibisagent.store import write_record
from ibisagent.volumes import SliceView, Volume
from ibisagent.volumes.grid import planes, release
from ibisagent.volumes.label_maps import BESIDE, LABEL_MAP, SEGMENTATION, write_label_map, write_slicer_segmentation
from ibisagent.volumes.measures import Measures, measure, write_measures
from ibisagent.volumes.writing import check_nifti, write_nifti, write_png_stack, write_rle

DICOM_FORMATS = ("seg", "sr", "rtstruct")
FORMATS = ("nifti", *DICOM_FORMATS, "labels", "seg.nrrd", "png", "rle")
"""sr refers to seg. labels: one NIfTI label map with its names; seg.nrrd: 3D Slicer's segmentation."""

_TOGETHER: Mapping[str, tuple[str, tuple[str, ...], Callable[..., None]]] = {
    "rle": ("_masks.json", (), write_rle),
    "labels": (f"_labels{LABEL_MAP}", tuple(f"_labels{suffix}" for suffix in BESIDE), write_label_map),
    "seg.nrrd": (f"_masks{SEGMENTATION}", (), write_slicer_segmentation),
}
"""Formats that hold all masks: how the file's name ends, those of files beside it, and who writes them."""

RECORD_FORMAT, RECORD_VERSION = "ibisagent volume", 2
_OVERVIEW_SLICES, _OVERVIEW_COLUMNS, _TILE = 12, 4, 256


@dataclass(frozen=True, slots=True)
class VolumeOutputs:
    """Where the files of one volume are: masks by target and format ("" where one file holds all), and the others.

    failed: why formats that were asked for are not there, a line each.
    """

    masks: Mapping[str, Mapping[str, Path]]
    measures: Mapping[str, Measures]
    tables: tuple[Path, ...]
    overview: Path
    record: Path
    dicom: tuple[Path, ...]
    failed: tuple[str, ...] = ()


class VolumeWriter:
    """Collects the files of one run in a hidden folder; `finish` moves them to their place, the record last.

    Use as a context: leaving it without `finish` leaves nothing behind.
    """

    def __init__(self, folder: Path, name: str, formats: Sequence[str]) -> None:
        """folder: made if it is not there. name: what file names begin with. ConfigError for an unknown format."""
        if wrong := [kind for kind in formats if kind not in FORMATS]:
            raise ConfigError(f"unknown format '{wrong[0]}': give {', '.join(FORMATS)}")
        self._folder, self._name = folder, name
        self._formats = tuple(dict.fromkeys(formats))
        self._unfinished = ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._part = self._unfinished.enter_context(unfinished_folder(folder, name))
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as a folder ({error.strerror}); choose another one") from error
        self._files: list[str] = []
        self._episodes: dict[int, list[str]] = {}
        self._failed: dict[str, str] = {}

    def prepare(self, volume: Volume, provenance: Mapping[str, str]) -> tuple[str, ...]:
        """Find out which formats can hold masks of `volume`, before there are any; what will be repaired, a line each.

        The others are left out of `finish`, which says why. Raises the error of the first where none can.
        """
        notes: list[str] = []
        errors: list[IbisError] = []
        facts = {"ibisagent": package_version(), **provenance}
        for kind in self._formats:
            try:
                if kind == "nifti":
                    check_nifti(volume)
                elif kind == "seg" or (kind == "sr" and "seg" not in self._formats):
                    from ibisagent.volumes.dicom_output import check_source

                    notes += check_source(volume, self._folder / f"{self._name}_{kind}.dcm", facts)
                elif kind == "rtstruct":
                    from ibisagent.volumes.rtstruct import check_rtstruct

                    notes += check_rtstruct(volume, self._folder / f"{self._name}_{kind}.dcm")
            except IbisError as error:
                self._failed[kind] = str(error)
                errors.append(error)
        if "seg" in self._failed and "sr" in self._formats:
            self._failed["sr"] = self._failed["seg"]
        if len(self._failed) == len(self._formats):
            raise errors[0]
        return tuple(dict.fromkeys(notes))

    def __enter__(self) -> VolumeWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._unfinished.close()

    def episode(self, index: int, _why: Why, episode: Episode, _image: Image) -> None:
        """Write the record of one episode at once; for `run_volume(on_episode=...)`."""
        again = len(self._episodes.get(index, ()))
        file = f"{self._name}_slice-{index:04d}{f'-{again + 1}' if again else ''}_record.json"
        write_record(episode, self._new(file))
        self._episodes.setdefault(index, []).append(file)

    def finish(
        self,
        found: VolumeSegmentation,
        view: SliceView,
        query: str,
        provenance: Mapping[str, str],
        *,
        channel: int | None = None,
        input_facts: Mapping[str, Any] | None = None,
    ) -> VolumeOutputs:
        """Write masks, measurements, overview and record, then move all to their place.

        channel: which of the volumes on one grid this was read from, for the record. input_facts: what tells this
        result from that of another input or other settings, for the record. A format that cannot hold this volume, or
        needs a library that is not installed, is left out and told (`VolumeOutputs.failed`).
        Raises DataError when the disk is full; then no file appears.
        """
        volume = view.volume
        facts = {"ibisagent": package_version(), **provenance}
        measured = {}
        for target, mask in found.masks.items():
            measured[target] = measure(view, mask)
            release(mask)
        masks: dict[str, dict[str, Path]] = {target: {} for target in found.masks}
        taken: set[str] = set()
        for target in found.masks:
            plain = safe_name(target, taken)
            files: Mapping[str, tuple[str, Callable[..., None]]] = {
                "nifti": (f"{self._name}_mask_{plain}.nii.gz", write_nifti),
                "png": (f"{self._name}_mask_{plain}", write_png_stack),
            }
            for kind in [kind for kind in self._formats if kind in files]:
                file, write = files[kind]
                if self._can(kind, file, partial(write, found.masks[target], volume)):
                    masks[target][kind] = self._folder / file
        for kind in [kind for kind in self._formats if kind in _TOGETHER and masks]:
            suffix, beside, write_all = _TOGETHER[kind]
            file = f"{self._name}{suffix}"
            if self._can(kind, file, partial(write_all, found.masks, volume)):
                self._files += [f"{self._name}{other}" for other in beside]
                for target in masks:
                    masks[target][kind] = self._folder / file
        dicom = self._dicom(found, view, measured, facts)
        tables = (f"{self._name}_measures.json", f"{self._name}_measures.csv")
        for file in tables:
            write_measures(measured, volume.name, self._new(file))
        overview = f"{self._name}_overlay.png"
        write_png(_overview(found, view), self._new(overview))
        record = f"{self._name}_record.json"
        content = self._record(found, view, query, facts, measured) | {
            "channel": channel,
            "input": dict(input_facts or {}),
        }
        write_json(content, self._new(record))
        self._move()
        return VolumeOutputs(
            masks,
            measured,
            tuple(self._folder / file for file in tables),
            self._folder / overview,
            self._folder / record,
            tuple(self._folder / file for file in dicom),
            tuple(dict.fromkeys(self._failed.values())),
        )

    def _can(self, kind: str, file: str, write: Callable[[Path], object]) -> bool:
        """Write `file` of a format by `write`; False where the format has failed or fails now, which is told later."""
        if kind in self._failed:
            return False
        try:
            write(self._part / file)
        except IbisError as error:
            self._failed[kind] = str(error)
            return False
        self._files.append(file)
        return True

    def _dicom(
        self,
        found: VolumeSegmentation,
        view: SliceView,
        measured: Mapping[str, Measures],
        provenance: Mapping[str, str],
    ) -> list[str]:
        wanted = set(DICOM_FORMATS) & set(self._formats)
        if not wanted or not any(mask.any() for mask in found.masks.values()):
            return []  # DICOM has no empty segmentation; the record says that nothing was found
        from ibisagent.volumes.dicom_output import write_report, write_segmentation
        from ibisagent.volumes.rtstruct import write_rtstruct

        written, made = list[str](), list[Any]()

        def write(kind: str, name: str, how: Callable[[Path], object]) -> None:
            file = f"{self._name}_{name}.dcm"
            if self._can(kind, file, how):
                written.append(file)

        if wanted & {"seg", "sr"}:
            kind = "seg" if "seg" in wanted else "sr"
            write(kind, "seg", lambda path: made.append(write_segmentation(found.masks, view.volume, path, provenance)))
        if "sr" in wanted and made:
            write("sr", "sr", lambda path: write_report(measured, made[0], view.volume, path, provenance))
        if "rtstruct" in wanted:
            write("rtstruct", "rtstruct", lambda path: write_rtstruct(found.masks, view.volume, path, provenance))
        return written

    def _record(
        self,
        found: VolumeSegmentation,
        view: SliceView,
        query: str,
        provenance: Mapping[str, str],
        measured: Mapping[str, Measures],
    ) -> dict[str, Any]:
        volume = view.volume
        return {
            "format": RECORD_FORMAT,
            "version": RECORD_VERSION,
            "volume": volume.name,
            "modality": volume.modality,
            "shape": list(volume.shape),
            "affine": volume.affine.tolist(),
            "axis": view.axis,
            "window": {
                "low": view.window.low,
                "high": view.window.high,
                "from": view.window_source,
                "asked": view.window_asked,
            },
            "query": query,
            "recheck": found.recheck,
            "max_turns": found.max_turns,
            "made_by": dict(sorted(provenance.items())),
            "cost": asdict(found.cost),
            "measures": {target: asdict(values) for target, values in measured.items()},
            "masks_sha256": {target: mask_sha256(mask) for target, mask in found.masks.items()},
            "ignored": list(found.ignored),
            "failed_formats": dict(self._failed),
            "asked": [{**asdict(asked), "records": self._episodes.get(asked.slice, [])} for asked in found.asked],
            "carried": [asdict(carried) for carried in found.carried],
        }

    def _new(self, file: str) -> Path:
        self._files.append(file)
        return self._part / file

    def _move(self) -> None:
        try:
            for file in self._files:
                target = self._folder / file
                if target.is_dir() and (target / "grid.json").is_file():  # an older stack of PNG files
                    os.replace(target, self._part / f"old-{file}")
                os.replace(self._part / file, target)
        except OSError as error:
            raise DataError(f"{self._folder}: cannot be written ({error.strerror}); choose another one") from error


def volume_record(path: Path) -> dict[str, Any] | None:
    """What the record of a volume holds; None for any other file, and for what cannot be read."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("format") == RECORD_FORMAT else None


def mask_sha256(mask: np.ndarray) -> str:
    """Hash of the voxels of an (I, J, K) mask, eight to a byte, plane by plane."""
    digest = hashlib.sha256(repr(mask.shape).encode())
    for plane in planes(mask):
        digest.update(np.packbits(plane).tobytes())
    return digest.hexdigest()


def _overview(found: VolumeSegmentation, view: SliceView) -> PIL.Image.Image:
    """Up to 12 slices with masks, spread over what was found; where nothing was, over the volume."""
    shown = [
        index for index in range(view.count) if any(view.voxels_of(mask, index).any() for mask in found.masks.values())
    ]
    indexes = shown or list(range(view.count))
    count = min(_OVERVIEW_SLICES, len(indexes))
    chosen = [indexes[int((place + 0.5) * len(indexes) / count)] for place in range(count)]
    scale = _TILE / max(view.size)
    height, width = (max(1, round(side * scale)) for side in view.size)
    columns = min(_OVERVIEW_COLUMNS, count)
    sheet = PIL.Image.new("RGB", (columns * width, -(-count // columns) * height))
    for place, index in enumerate(chosen):
        masks = {target: view.read_mask(mask, index) for target, mask in found.masks.items()}
        tile = overlay(view.image(index), masks).resize((width, height), PIL.Image.Resampling.BILINEAR)
        sheet.paste(tile, (place % columns * width, place // columns * height))
    return sheet
