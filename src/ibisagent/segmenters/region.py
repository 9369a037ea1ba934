"""`region`: grows regions of similar brightness. A fake for tests and examples: no weights, no torch, obeys clicks."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Image, Mask, Prompt
from ibisagent.segmenters import Prediction, check_prior, check_prompts
from ibisagent.segmenters.postprocess import obey, split_prompts

TOLERANCE = 0.12  # of the image's brightness range: how far a region may be from the pixel it grows from


class RegionSegmenter:
    """The segmenter. It holds nothing, and opening an image only smooths it."""

    name = "region"

    def open(self, image: Image) -> RegionSession:
        """A session on `image`."""
        return RegionSession(image)

    def describe(self) -> dict[str, str]:
        """Facts for records; there are no weights."""
        return {
            "segmenter": self.name,
            "runtime": f"opencv {cv2.__version__}",
            "weights_sha256": "",
            "licence": "Apache-2.0",
        }


class RegionSession:
    """One image. Its logits are (H, W) float32, 1 inside its mask and -1 outside."""

    def __init__(self, image: Image) -> None:
        self._size = image.size
        self._grey = cv2.GaussianBlur(image.pixels.astype(np.float32).mean(axis=2), (0, 0), 0.8)
        self._range = max(float(np.ptp(self._grey)), 1.0)

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """See `SegmenterSession`. The prior and what stands out in the box, without what is like the negative clicks,
        with what is like the positive ones."""
        check_prompts(prompts, self._size)
        check_prior(prior, self._size, self._size)
        positives, negatives, box = split_prompts(prompts)
        mask = np.zeros(self._size, dtype=bool) if prior is None else prior > 0
        if box is not None:
            mask |= self._inside(box)
        for click in negatives:
            mask &= ~self._around(click)
        for click in positives:
            mask |= self._around(click)
        mask = obey(mask, [prompt for prompt in prompts if isinstance(prompt, Click)], box)
        return Prediction(mask, self._contrast(mask), np.where(mask, 1, -1).astype(np.float32))

    def _around(self, click: Click) -> Mask:
        """The connected pixels whose brightness is like that of the clicked one."""
        filled = np.zeros((self._size[0] + 2, self._size[1] + 2), dtype=np.uint8)
        tolerance = TOLERANCE * self._range
        fixed = 8 | cv2.FLOODFILL_FIXED_RANGE | cv2.FLOODFILL_MASK_ONLY
        cv2.floodFill(self._grey, filled, (click.x, click.y), 0, tolerance, tolerance, fixed)
        return filled[1:-1, 1:-1] > 0

    def _inside(self, box: Box) -> Mask:
        """The pixels of the box that are on the side of its middle, when bright and dark are told apart (Otsu)."""
        crop = self._grey[box.y0 : box.y1, box.x0 : box.x1]
        levels = ((crop - crop.min()) / max(float(np.ptp(crop)), 1e-6) * 255).astype(np.uint8)
        _, bright = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        middle = bright[crop.shape[0] // 2, crop.shape[1] // 2]
        mask = np.zeros(self._size, dtype=bool)
        mask[box.y0 : box.y1, box.x0 : box.x1] = bright == middle
        return mask

    def _contrast(self, mask: Mask) -> float:
        """How far inside and outside differ in brightness, as a share of the image's range; stands in for quality."""
        if mask.all() or not mask.any():
            return 0.0
        return min(1.0, abs(float(self._grey[mask].mean() - self._grey[~mask].mean())) / self._range)
