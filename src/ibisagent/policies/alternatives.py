"""Other ways to begin an object than the one that a policy said, from the policy's own map of it.

A click and a box carry little of such a map to a segmenter. So the map itself may be the mask that the segmenter begins
from, a draft; and its likeliest part may be what is clicked and boxed. Which of the masks that come of it is the right
one the map tells better than the segmenter's score (docs/experiments). All this costs the policy nothing: its map is
there already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from ibisagent.domain import Click, Mask, Prompt
from ibisagent.imaging.clicks import bounding_box, deepest_pixel

SMOOTHING = 1.5  # cells: the likeliest place is one whose neighbours are likely, too
CLOSE = 0.5  # of the highest probability: where the likeliest part of an object ends
INSIDE = 0.5  # probability: where a draft ends


@dataclass(frozen=True, eq=False)
class Alternative:
    """Prompts for one target, and the draft that the segmenter begins from, if any (`domain.Completion`)."""

    prompts: tuple[Prompt, ...]
    drafts: Mapping[str, Mask] = field(default_factory=dict)


def alternatives(
    said: Sequence[Prompt], belief: np.ndarray, size: tuple[int, int], target: str
) -> Iterator[Alternative]:
    """What to try for `target` beside what was said, most useful first.

    said: the policy's own clicks and boxes on an image of `size` (H, W). belief: (L, L) probabilities of the object,
    see `policies.base.Proposal`.
    """
    draft = _whole(belief, size, cv2.INTER_LINEAR) > INSIDE
    part = _whole(_likeliest(belief), size, cv2.INTER_NEAREST) > 0
    deepest, box = deepest_pixel(part), bounding_box(part, target)
    clicks = tuple(prompt for prompt in said if isinstance(prompt, Click))
    if clicks and draft.any():
        yield Alternative(clicks, {target: draft})
    if deepest is not None and box is not None:  # else the part fell between the pixels of a tiny image
        click = Click(*deepest, True, target)
        yield Alternative((click, box))
        if draft.any():
            yield Alternative((click,), {target: draft})


def _likeliest(belief: np.ndarray) -> Mask:
    """What is connected with the likeliest place by places that are nearly as likely."""
    likely = cv2.GaussianBlur(belief.astype(np.float32), (0, 0), SMOOTHING)
    row, column = np.unravel_index(int(likely.argmax()), likely.shape)
    _, labels = cv2.connectedComponents((likely > CLOSE * likely[row, column]).astype(np.uint8))
    part: Mask = labels == labels[row, column]
    return part


def _whole(plane: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """A plane of the belief's cells on an image of `size`."""
    resized: np.ndarray = cv2.resize(plane.astype(np.float32), size[::-1], interpolation=interpolation)
    return resized
