"""Promptable segmenters behind one protocol: `load_segmenter(spec)` gives one, `open(image)` a session on an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ibisagent.domain import Image, Mask, Prompt


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
