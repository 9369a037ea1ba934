"""What comes of a volume: masks in the formats asked for, measurements, an overview, and the record of the run.

File names and records hold neither path nor patient: they begin with the volume's own name, which for DICOM is made
from a hash. DICOM objects (`seg`, `sr`) carry the patient of their source, as DICOM demands.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ibisagent.domain import Episode, Image
from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import safe_name, write_whole
from ibisagent.imaging.images import write_png
from ibisagent.inference.volume import VolumeSegmentation, Why
from ibisagent.protocol import overlay
from ibisagent.store import write_record
from ibisagent.volumes import SliceView
from ibisagent.volumes.measures import Measures, measure, write_measures
from ibisagent.volumes.writing import write_nifti, write_png_stack, write_rle

FORMATS = ("nifti", "seg", "sr", "png", "rle")
"""seg and sr are DICOM, and sr refers to seg."""

RECORD_FORMAT, RECORD_VERSION = "ibisagent volume", 2
_OVERVIEW_SLICES, _OVERVIEW_COLUMNS, _TILE = 12, 4, 256


@dataclass(frozen=True, slots=True)
class VolumeOutputs:
    """Where the files of one volume are: masks by target and format ("" where one file holds all), and the others."""

    masks: Mapping[str, Mapping[str, Path]]
    measures: Mapping[str, Measures]
    tables: tuple[Path, ...]
    overview: Path
    record: Path
    dicom: tuple[Path, ...]


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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._unfinished = tempfile.TemporaryDirectory(prefix=".ibisagent-", dir=folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as a folder ({error.strerror}); choose another one") from error
        self._part = Path(self._unfinished.name)
        self._files: list[str] = []
        self._episodes: dict[int, list[str]] = {}

    def __enter__(self) -> VolumeWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._unfinished.cleanup()

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
        made_by: Mapping[str, str],
        *,
        channel: int | None = None,
        input_facts: Mapping[str, Any] | None = None,
    ) -> VolumeOutputs:
        """Write masks, measurements, overview and record, then move all to their place.

        channel: which of several volumes on one grid this was read from, for the record. input_facts: what tells this
        result from that of another input or other settings, for the record.
        Raises DataError when the disk is full or a format cannot hold this volume, ConfigError when a format needs a
        library that is not installed; then no file appears.
        """
        volume = view.volume
        facts = {"ibisagent": package_version(), **made_by}
        measured = {target: measure(view, mask) for target, mask in found.masks.items()}
        masks: dict[str, dict[str, Path]] = {target: {} for target in found.masks}
        taken: set[str] = set()
        for target in found.masks:
            plain = safe_name(target, taken)
            files: Mapping[str, tuple[str, Callable[..., None]]] = {
                "nifti": (f"{self._name}_mask_{plain}.nii.gz", write_nifti),
                "png": (f"{self._name}_mask_{plain}", write_png_stack),
            }
            for kind in files.keys() & set(self._formats):
                file, write = files[kind]
                write(found.masks[target], volume, self._new(file))
                masks[target][kind] = self._folder / file
        if "rle" in self._formats:
            file = f"{self._name}_masks.json"
            write_rle(found.masks, volume, self._new(file))
            for target in masks:
                masks[target]["rle"] = self._folder / file
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
        write_whole((json.dumps(content, indent=1) + "\n").encode(), self._new(record))
        self._move()
        return VolumeOutputs(
            masks,
            measured,
            tuple(self._folder / file for file in tables),
            self._folder / overview,
            self._folder / record,
            tuple(self._folder / file for file in dicom),
        )

    def _dicom(
        self, found: VolumeSegmentation, view: SliceView, measured: Mapping[str, Measures], made_by: Mapping[str, str]
    ) -> list[str]:
        if not {"seg", "sr"} & set(self._formats) or not any(mask.any() for mask in found.masks.values()):
            return []  # DICOM has no empty segmentation; the record says that nothing was found
        from ibisagent.volumes.dicom_output import write_report, write_segmentation

        file = f"{self._name}_seg.dcm"
        segmentation = write_segmentation(found.masks, view.volume, self._new(file), made_by)
        if "sr" not in self._formats:
            return [file]
        report = f"{self._name}_sr.dcm"
        write_report(measured, segmentation, view.volume, self._new(report), made_by)
        return [file, report]

    def _record(
        self,
        found: VolumeSegmentation,
        view: SliceView,
        query: str,
        made_by: Mapping[str, str],
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
            "made_by": dict(sorted(made_by.items())),
            "cost": asdict(found.cost),
            "measures": {target: asdict(values) for target, values in measured.items()},
            "masks_sha256": {target: mask_sha256(mask) for target, mask in found.masks.items()},
            "ignored": list(found.ignored),
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


def mask_sha256(mask: np.ndarray) -> str:
    """Hash of the voxels of an (I, J, K) mask, eight to a byte, plane by plane."""
    digest = hashlib.sha256(repr(mask.shape).encode())
    for plane in mask:
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
