"""`ellipse`: what a box is worth without looking at the image. A baseline: no weights, no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ibisagent.domain import Click, Image, Mask, Prompt
from ibisagent.imaging.clicks import ellipse
from ibisagent.segmenters import Prediction, check_prior, check_prompts
from ibisagent.segmenters.postprocess import obey, split_prompts

CLICK_RADIUS = 0.1  # of the image's shorter side: the disc around a click without any box
SCORE = 0.5  # it has no idea how good it is


class EllipseSegmenter:
    """The segmenter. It holds nothing."""

    name = "ellipse"

    def open(self, image: Image) -> EllipseSession:
        """A session on `image`, of which only the size is looked at."""
        return EllipseSession(image.size)

    def describe(self) -> dict[str, str]:
        """Facts for records; there are no weights."""
        return {
            "segmenter": self.name,
            "runtime": f"numpy {np.__version__}",
            "weights_sha256": "",
            "licence": "Apache-2.0",
        }


class EllipseSession:
    """One image of `size` (H, W). Its logits are (H, W) float32, 1 inside its mask and -1 outside."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """See `SegmenterSession`. The ellipse in the newest box; without one, the prior and a disc around each positive
        click; every click is then obeyed."""
        check_prompts(prompts, self._size)
        check_prior(prior, self._size, self._size)
        positives, _, box = split_prompts(prompts)
        if box is not None:
            mask = ellipse(box, self._size)
        else:
            mask = np.zeros(self._size, dtype=bool) if prior is None else prior > 0
            for click in positives:
                mask = mask | self._disc(click)
        mask = obey(mask, [prompt for prompt in prompts if isinstance(prompt, Click)], box)
        return Prediction(mask, SCORE, np.where(mask, 1, -1).astype(np.float32))

    def _disc(self, click: Click) -> Mask:
        y, x = np.ogrid[: self._size[0], : self._size[1]]
        inside: Mask = (x - click.x) ** 2 + (y - click.y) ** 2 <= (CLICK_RADIUS * min(self._size)) ** 2
        return inside
