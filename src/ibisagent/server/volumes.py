"""Volumes for the server: the package's own reader, agent and writer, in the shape that the service asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ibisagent.domain import Image, Mask, Masks
from ibisagent.errors import ConfigError
from ibisagent.inference.volume import run_volume
from ibisagent.policies.base import Policy
from ibisagent.segmenters import Segmenter
from ibisagent.server.service import VolumeLike
from ibisagent.volumes import SliceView, Volume, read_volume
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

    def segment(self, volume: VolumeLike, query: str, policy: Policy, segmenter: Segmenter) -> dict[str, Mask]:
        """As `volume_agent.run_volume`, searching for the object."""
        return dict(run_volume(SliceView(_package(volume)), query, policy, segmenter).masks)

    def write_masks(self, masks: Masks, volume: VolumeLike, path: Path) -> None:
        """All masks as one label map in NIfTI, on the volume's grid."""
        source = _package(volume)
        labels = np.zeros(source.shape, dtype=np.uint8)
        for number, mask in enumerate(masks.values(), 1):
            labels[mask] = number
        write_nifti(labels, source, path)


def _package(volume: VolumeLike) -> Volume:
    if not isinstance(volume, ShownVolume):
        raise ConfigError("this volume was not read by the package")
    return volume.volume
