"""The first lines of Python: `ibisagent.segment("eye.png", "optic disc")`, and the same for volumes.

Models are loaded at their first use and kept for the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ibisagent.domain import Case, Episode, Image, Mask, Masks, MaskSelection
from ibisagent.errors import DataError
from ibisagent.files import safe_name
from ibisagent.inference.image import Outputs, asked_objects, export, provenance_of, read_case, run_case
from ibisagent.inference.volume import RECHECK, VolumeSegmentation, parse_slices, run_volume
from ibisagent.inference.volume_files import VolumeOutputs, VolumeWriter
from ibisagent.policies import load_policy
from ibisagent.policies.base import Policy
from ibisagent.query import target_of
from ibisagent.segmenters import Segmenter, load_segmenter
from ibisagent.volumes import SliceView, Volume, read_volume
from ibisagent.volumes.label_maps import choose_start
from ibisagent.volumes.writing import masks_on

DEFAULT_POLICY, DEFAULT_SEGMENTER = "ibis-nano", "ibis-click"

_policy_of = lru_cache(maxsize=2)(load_policy)
_segmenter_of = lru_cache(maxsize=2)(load_segmenter)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentedImage:
    """What an agent found in one image.

    image: the pixels (H, W, 3) uint8 and their hash. episode: every turn with its thought, actions and masks, and who
    made it.
    """

    image: Image
    episode: Episode

    @property
    def masks(self) -> Masks:
        """(H, W) bool by name of the object; all False for one that is absent."""
        return self.episode.answer_masks

    @property
    def answer(self) -> str:
        """What the agent said at its end, such as "The optic disc is segmented."; "" where it said nothing."""
        return self.episode.answer.answer

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of what the agent says is not in the image."""
        return self.episode.answer.absent

    @property
    def objects(self) -> list[dict[str, Any]]:
        """What the agent knows of each object that was asked for, see `inference.image.asked_objects`."""
        return asked_objects(self.episode)

    def save(self, folder: str | Path, name: str = "") -> Outputs:
        """Write `NAME_mask_TARGET.png`, `NAME_overlay.png` and `NAME_record.json`, which `ibisagent replay` reads.

        name: default the image file's, without its ending. Files of the same name are replaced. Raises DataError where
        the folder cannot be written; then nothing has changed.
        """
        return export(self.episode, self.image, folder, name or safe_name(Path(self.image.source).stem, set()))


@dataclass(frozen=True, slots=True, eq=False)
class SegmentedVolume:
    """What an agent found in one volume, on the slices of `view`; provenance: policy, segmenter and their versions."""

    view: SliceView
    query: str
    found: VolumeSegmentation
    provenance: Mapping[str, str]

    @property
    def masks(self) -> Mapping[str, np.ndarray]:
        """(I, J, K) bool by name of the object, on the volume's grid."""
        return self.found.masks

    def save(self, folder: str | Path, name: str = "", formats: tuple[str, ...] = ("nifti",)) -> VolumeOutputs:
        """Write masks in `formats`, measurements, an overview and a record. Raises as `VolumeWriter.finish`.

        name: default the volume's. The records of single slices, which `ibisagent replay` needs, are written by the
        command `ibisagent segment` alone.
        """
        with VolumeWriter(Path(folder), name or safe_name(self.view.volume.name, set()), formats) as files:
            return files.finish(self.found, self.view, self.query, self.provenance)


def segment(
    image: str | Path | np.ndarray | PIL.Image.Image | Image,
    query: str,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    segmenter: str | Segmenter = DEFAULT_SEGMENTER,
    start_mask: str | Path | Mask | None = None,
    max_turns: int | None = None,
    mask_selection: MaskSelection | None = None,
) -> SegmentedImage:
    """Segment what `query` names in one image.

    Args:
        image: a file (PNG, JPEG, TIFF, BMP), an array (H, W) or (H, W, 3) uint8 in RGB order, or a PIL image.
        query: a name or a sentence, such as "optic disc" or "Segment the left lung.".
        policy: who clicks, as for `load_policy`, or a loaded one.
        segmenter: what turns clicks into masks, as for `load_segmenter`, or a loaded one.
        start_mask: a mask to refine: a file, or (H, W) bool.
        max_turns: default the policy's own limit.
        mask_selection: which masks are the answer: "best" by the segmenter's estimate, or "last"; None as the policy's
            dialect has it.

    Raises:
        ConfigError: for an empty query or an unknown policy or segmenter.
        DataError: for an image or mask that cannot be used.
        PolicyError, SegmenterError: when their machinery fails.
    """
    mask_file = start_mask if isinstance(start_mask, str | Path) else None
    if isinstance(image, str | Path):
        case = read_case(image, query, mask_file)
    else:
        case = Case("image", _image_of(image), query)
        if mask_file is not None:
            raise DataError("start_mask: is a file, the image is none; give the mask as an array as well")
    if isinstance(start_mask, np.ndarray):
        case = replace(case, start={target_of(case.query): _mask_of(start_mask, case.image.size)})
    agent, engine = _models(policy, segmenter)
    episode = run_case(case, agent, engine, max_turns=max_turns, mask_selection=mask_selection)
    return SegmentedImage(case.image, episode)


def segment_volume(
    volume: str | Path | Volume,
    query: str,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    segmenter: str | Segmenter = DEFAULT_SEGMENTER,
    axis: str = "auto",
    window: str = "auto",
    slices: str | None = None,
    recheck: int = RECHECK,
    start_mask: str | Path | None = None,
    label: str | None = None,
    max_turns: int | None = None,
    mask_selection: MaskSelection | None = None,
) -> SegmentedVolume:
    """Segment what `query` names in one volume.

    Args:
        volume: a file (NIfTI, NRRD, MHA, multi-frame DICOM), a folder with one DICOM series, or a read one.
        query: a name or a sentence.
        policy: who clicks, as for `load_policy`, or a loaded one.
        segmenter: what turns clicks into masks, as for `load_segmenter`, or a loaded one.
        axis: slices to look at: auto, axial, coronal, sagittal.
        window: "auto", a name such as "lung", "LEVEL/WIDTH", or "1-99%".
        slices: key slices that the agent is asked about, such as "12,40,77" or "::10"; None searches.
        recheck: the agent is asked again after so many slices; 0 never asks again.
        start_mask: a mask file on the volume's grid to refine.
        label: which object of the start mask is refined, see `choose_start`.
        max_turns: of one slice; default the policy's own limit.
        mask_selection: which masks of a slice are its answer: "best" or "last"; None as the policy's dialect has it.

    Raises: as `segment`.
    """
    read = volume if isinstance(volume, Volume) else read_volume(volume)
    view = SliceView(read, axis, window)
    start = {} if start_mask is None else choose_start(masks_on(read, Path(start_mask)), query, label, start_mask)
    agent, engine = _models(policy, segmenter)
    provenance = provenance_of(agent, engine)
    found = run_volume(
        view,
        query,
        agent,
        engine,
        keys=None if slices is None else parse_slices(slices, view.count),
        recheck=recheck,
        max_turns=max_turns,
        mask_selection=mask_selection,
        start=start,
        provenance=provenance,
    )
    return SegmentedVolume(view, query, found, {"policy": agent.name, **provenance})


def _models(policy: str | Policy, segmenter: str | Segmenter) -> tuple[Policy, Segmenter]:
    return (
        _policy_of(policy) if isinstance(policy, str) else policy,
        _segmenter_of(segmenter) if isinstance(segmenter, str) else segmenter,
    )


def _image_of(image: np.ndarray | PIL.Image.Image | Image) -> Image:
    if isinstance(image, Image):
        return image
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, PIL.Image.Image) else np.asarray(image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise DataError(
            f"image: expected (H, W) or (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}; convert it first"
        )
    return Image(np.ascontiguousarray(pixels))


def _mask_of(mask: np.ndarray, size: tuple[int, int]) -> Mask:
    if mask.shape != size or mask.dtype != np.bool_ or not mask.any():
        raise DataError(f"start_mask: expected {size} bool with the object in it, got {mask.shape} {mask.dtype}")
    return mask
