"""Volumes for the server: the package's own reader, agent and writer, in the shape that the service asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ibisagent.domain import Action, Case, Click, Image, Mask, Masks, Reply, Stop
from ibisagent.environment import package_version
from ibisagent.errors import ConfigError
from ibisagent.inference.image import run_case
from ibisagent.inference.volume import run_volume, slice_id
from ibisagent.policies.base import Policy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.protocol import MAX_ACTIONS, write
from ibisagent.segmenters import Segmenter
from ibisagent.server.service import VolumeLike, VoxelClick
from ibisagent.volumes import SliceView, Volume, read_volume
from ibisagent.volumes.itk import write_nrrd
from ibisagent.volumes.windows import HOUNSFIELD
from ibisagent.volumes.writing import write_nifti

AXES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True, eq=False)
class ShownVolume:
    """A volume as slices in the three directions of the body."""

    volume: Volume

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices along each of AXES."""
        first, second, third = (SliceView(self.volume, axis).count for axis in AXES)
        return first, second, third

    def slice(self, axis: int, index: int, window: str) -> Image:
        """One slice as it is shown."""
        return SliceView(self.volume, AXES[axis], window).image(index)


class PackageVolumes:
    """See `service.VolumeFormats`."""

    windows: Sequence[str] = ("auto", *HOUNSFIELD)

    def read(self, path: Path) -> ShownVolume:
        """As `volumes.read_volume`."""
        return ShownVolume(read_volume(path))

    def segment(
        self, volume: VolumeLike, query: str, policy: Policy, segmenter: Segmenter, on_slice: Callable[[int], None]
    ) -> dict[str, Mask]:
        """As `inference.volume.run_volume`, searching for the object."""
        return dict(run_volume(SliceView(_package(volume)), query, policy, segmenter, on_slice=on_slice).masks)

    def click(
        self,
        volume: VolumeLike,
        clicks: Sequence[VoxelClick],
        segmenter: Segmenter,
        on_slice: Callable[[int], None],
        *,
        through: bool,
    ) -> dict[str, Mask]:
        """The clicks of a slice make its masks; through the others `inference.volume` carries them, where `through`."""
        view = SliceView(_package(volume))
        given: dict[int, list[Action]] = {}
        for click in clicks:
            index, x, y = view.pixel(click.voxel)
            given.setdefault(index, []).append(Click(x, y, click.positive, click.target))
        if through:
            script = {slice_id(view, index): _replies(actions, view) for index, actions in given.items()}
            longest = max(map(len, script.values()))
            policy = ScriptedPolicy(script, name="user")
            found = run_volume(
                view, clicks[0].target, policy, segmenter,
                keys=sorted(given), recheck=0, max_turns=longest, mask_selection="last",
                on_slice=on_slice,
            )  # fmt: skip
            return dict(found.masks)
        masks: dict[str, Mask] = {}
        for index, actions in given.items():
            case = Case(slice_id(view, index), view.image(index), clicks[0].target)
            replies = _replies(actions, view)
            episode = run_case(
                case, ScriptedPolicy(replies, name="user"), segmenter, max_turns=len(replies), mask_selection="last"
            )
            for target, mask in episode.answer_masks.items():
                view.write_mask(masks.setdefault(target, np.zeros(view.volume.shape, bool)), index, mask)
        return masks

    def write_masks(
        self, masks: Masks, volume: VolumeLike, path: Path, *, dtype: str = "uint8", compressed: bool = True
    ) -> None:
        """All masks as one label map in NIfTI or NRRD, or as a DICOM segmentation, by the ending of `path`."""
        source = _package(volume)
        if path.suffix == ".dcm":
            from ibisagent.volumes.dicom_output import write_segmentation

            write_segmentation(masks, source, path, {"ibisagent": package_version()})
            return
        labels = np.zeros(source.shape, dtype=np.uint8)
        for number, mask in enumerate(masks.values(), 1):
            labels[mask] = number
        if path.suffix == ".nrrd":
            write_nrrd(labels.astype(dtype), source, path, compressed=compressed)
        else:
            write_nifti(labels, source, path)


def _replies(actions: Sequence[Action], view: SliceView) -> list[str]:
    """The clicks of one slice as turns, and a stop."""
    turns = [tuple(actions[start : start + MAX_ACTIONS]) for start in range(0, len(actions), MAX_ACTIONS)]
    return [write(Reply("", turn), view.size, dialect="ibis") for turn in [*turns, (Stop(),)]]


def _package(volume: VolumeLike) -> Volume:
    if not isinstance(volume, ShownVolume):
        raise ConfigError("this volume was not read by the package")
    return volume.volume
