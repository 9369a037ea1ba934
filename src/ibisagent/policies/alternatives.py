"""Other ways to prompt a segmenter for one object: what a policy said, and what its own map of the object says.

A segmenter that is prompted a little differently often draws another outline, or another object. Which of the masks is
the right one the policy's map tells better than the segmenter's score (docs/experiments); so first turns that lie near
each other are worth trying, and they cost the policy nothing: its map is there already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Mask, Prompt
from ibisagent.imaging.clicks import bounding_box, deepest_pixel

SMOOTHING = 1.5  # cells: the likeliest place is one whose neighbours are likely, too
CLOSE, WIDE = 0.5, 0.25  # of the highest probability: where an object ends
GROWN, SHRUNK = 1.2, 0.83  # times the sides of the policy's own box
_FAR = 7  # cells: the least distance of the second likeliest place from the likeliest


def alternatives(said: Sequence[Prompt], belief: np.ndarray, size: tuple[int, int], target: str) -> list[list[Prompt]]:
    """Prompts for `target` in place of `said`, most useful first, none twice.

    said: the policy's own clicks and boxes on an image of `size` (H, W). belief: (L, L) probabilities of the object,
    see `policies.base.Proposal`.
    """
    found = [list(said)]
    found += [prompts for prompts in _ways(said, belief, size, target) if prompts not in found]
    return list({tuple(prompts): prompts for prompts in found}.values())[1:]


def _ways(said: Sequence[Prompt], belief: np.ndarray, size: tuple[int, int], target: str) -> Iterator[list[Prompt]]:
    clicks = [prompt for prompt in said if isinstance(prompt, Click)]
    boxes = [prompt for prompt in said if isinstance(prompt, Box)]
    likely = cv2.GaussianBlur(belief.astype(np.float32), (0, 0), SMOOTHING)
    first = _region(likely, CLOSE)
    yield _around(first, size, target)
    if len(boxes) == 1:
        yield [*boxes]
        if clicks:
            yield [*clicks]
    yield _around(_region(likely, WIDE), size, target)
    if len(boxes) == 1:
        yield from ([*clicks, _scaled(boxes[0], factor, size)] for factor in (GROWN, SHRUNK))
    elsewhere = _without(likely, first)
    if elsewhere.max() > 0:
        yield _around(_region(elsewhere, CLOSE), size, target)


def _region(likely: np.ndarray, share: float) -> Mask:
    """What is connected with the likeliest place by places that have at least this share of its probability."""
    row, column = np.unravel_index(int(likely.argmax()), likely.shape)
    _, labels = cv2.connectedComponents((likely >= share * likely[row, column]).astype(np.uint8))
    region: Mask = labels == labels[row, column]
    return region


def _without(likely: np.ndarray, region: Mask) -> np.ndarray:
    """`likely`, but 0 in and near a region."""
    row, column = np.unravel_index(int(likely.argmax()), likely.shape)
    rows, columns = np.indices(likely.shape)
    near = (rows - row) ** 2 + (columns - column) ** 2 < _FAR**2
    taken = (cv2.dilate(region.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0) | near
    left: np.ndarray = np.where(taken, 0, likely)
    return left


def _around(region: Mask, size: tuple[int, int], target: str) -> list[Prompt]:
    """The deepest place of a region of the belief's cells, and the box around it, on an image of `size`."""
    whole = cv2.resize(region.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST) > 0
    deepest, box = deepest_pixel(whole), bounding_box(whole, target)
    if deepest is None or box is None:  # the region fell between the pixels of a tiny image
        return []
    return [Click(*deepest, True, target), box]


def _scaled(box: Box, factor: float, size: tuple[int, int]) -> Box:
    """`box` with sides `factor` times as long around its middle, within an image of `size`, at least a pixel wide."""
    height, width = size
    x0, x1 = _stretched(box.x0, box.x1, factor, width)
    y0, y1 = _stretched(box.y0, box.y1, factor, height)
    return Box(x0, y0, x1, y1, box.target)


def _stretched(low: int, high: int, factor: float, limit: int) -> tuple[int, int]:
    middle, reach = (low + high) / 2, (high - low) / 2 * factor
    start = min(max(round(middle - reach), 0), limit - 1)
    return start, min(max(round(middle + reach), start + 1), limit)
