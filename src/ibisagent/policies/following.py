"""How an expert acts: it goes by its own map of the object, which needs no words.

A map (L, L) of logits is what few images teach best, and it is worth more than any single click: on lungs in CT its
own IoU was 0.91 where a click and a box gave 0.2 and single corrections 0.5 (docs/experiments). So each turn tells the
segmenter much of it: clicks spread over what the map is sure of, and against what it is sure is something else, first
with a box around the object, then where the mask still differs. It stops once mask and map agree.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from ibisagent.domain import Action, Box, Click, Mask, Observation, Reply, Stop, standing
from ibisagent.imaging.clicks import bounding_box, interior_depth
from ibisagent.imaging.masks import iou
from ibisagent.policies.one_by_one import ABSENT_HERE, DONE, FIRST_THOUGHT, LEAKED, MISSED, NOT_THERE, SEGMENTED

SIDE = 512  # pixels of the longer side that places are looked for on
TURNS = 3  # the last one stops as well
SEEN = -2.0  # logit: an object whose map is nowhere above it is called absent
SURE = 1.0  # logit, either way
PART = 0.1  # area of a separate part, as a share of the largest one's, below which it is a speck
AGREE = 0.85  # IoU of mask and map
FOR, AGAINST, CORRECTING = 16, 10, 10  # clicks of a first turn, and of a later one, at most
SHALLOW, SHALLOW_ERROR = 0.25, 0.5  # depth as a share of the deepest place's below which no click is worth it
MARGIN, RIM = 0.1, 0.08  # of the box: how far around it clicks go, and what is too near to the object for one


def follow(seen: Observation, region: np.ndarray, name: str) -> Reply:
    """The next reply about the one object of `seen`, whose map is `region`; targets are left unnamed."""
    size = seen.image.size
    scale = min(1.0, SIDE / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    logits = cv2.resize(region.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    current = np.zeros(size, np.uint8)
    for mask in seen.masks.values():
        current |= mask
    small = cv2.resize(current, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    if not current.any() and not seen.turns:
        if logits.max() < SEEN:
            return Reply(NOT_THERE.format(name), (Stop(ABSENT_HERE.format(name), (name,)),))
        return Reply(FIRST_THOUGHT.format(name), tuple(_enlarged(one, small.shape, size) for one in _opening(logits)))
    clicks: list[Action] = []
    if len(seen.turns) < TURNS:
        given = standing(seen.turns)
        clicks = [_enlarged(one, small.shape, size) for one in _corrections(logits, small)]
        clicks = [one for one in clicks if one not in [replace(prompt, target="") for prompt in given]]
    stop = Stop(SEGMENTED.format(name))
    if not clicks:
        return Reply(DONE.format(name), (stop,))
    first = clicks[0]
    thought = (MISSED if isinstance(first, Click) and first.positive else LEAKED).format(name)
    return Reply(thought, (*clicks, stop) if len(seen.turns) >= TURNS - 1 else tuple(clicks))


def _opening(logits: np.ndarray) -> list[Click | Box]:
    """Clicks into what the map shows, a box around it, and clicks against what else is in and near the box."""
    shown = _without_specks(logits > min(0.0, float(logits.max()) - SURE))
    clicks = [Click(x, y, True, "") for _, x, y in _spread(shown, FOR, SHALLOW)]
    box = bounding_box(shown, "")
    assert box is not None  # noqa: S101 - the map has a highest place
    high, wide = box.y1 - box.y0, box.x1 - box.x0
    near = np.zeros(logits.shape, bool)
    above, left = int(MARGIN * high), int(MARGIN * wide)
    near[max(0, box.y0 - above) : box.y1 + above, max(0, box.x0 - left) : box.x1 + left] = True
    against = _spread(near & (logits < -SURE), AGAINST, SHALLOW, RIM * min(high, wide))
    return [clicks[0], box, *clicks[1:], *(Click(x, y, False, "") for _, x, y in against)]


def _corrections(logits: np.ndarray, current: Mask) -> list[Click]:
    """Clicks against the deepest mistakes that the map is sure of; none where map and mask agree."""
    if iou(current, logits > 0) >= AGREE:
        return []
    wanted = np.where(np.abs(logits) >= SURE, logits > 0, current)
    sides = ((wanted & ~current, True), (current & ~wanted, False))
    found = [
        (depth, Click(x, y, positive, ""))
        for error, positive in sides
        for depth, x, y in _spread(error, CORRECTING, SHALLOW_ERROR)
    ]
    found.sort(key=lambda one: -one[0])
    return [click for depth, click in found[:CORRECTING] if depth >= SHALLOW_ERROR * found[0][0]]


def _enlarged(prompt: Click | Box, small: tuple[int, ...], size: tuple[int, int]) -> Click | Box:
    """A prompt on a grid of the size `small` (H, W), on an image of `size` (H, W)."""
    down, across = size[0] / small[0], size[1] / small[1]
    if isinstance(prompt, Click):
        return replace(prompt, x=int((prompt.x + 0.5) * across), y=int((prompt.y + 0.5) * down))
    return Box(
        int(prompt.x0 * across),
        int(prompt.y0 * down),
        min(size[1], math.ceil(prompt.x1 * across)),
        min(size[0], math.ceil(prompt.y1 * down)),
        prompt.target,
    )


def _spread(region: Mask, count: int, shallow: float, least: float = 1.0) -> list[tuple[float, int, int]]:
    """(depth, x, y) of at most `count` places in a region: the deepest one, then the deepest outside the discs around
    those before. None of less than `least` pixels, or than the share `shallow` of the first one's depth."""
    left = region.astype(np.uint8)
    found: list[tuple[float, int, int]] = []
    for _ in range(count):
        depths = interior_depth(left > 0)
        y, x = (int(place) for place in np.unravel_index(depths.argmax(), depths.shape))
        depth = float(depths[y, x])
        if depth < least or (found and depth < shallow * found[0][0]):
            break
        found.append((depth, x, y))
        cv2.circle(left, (x, y), round(depth), 0, -1)
    return found


def _without_specks(region: Mask) -> Mask:
    """The connected parts of a region that are not small beside the largest."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = [number for number in range(1, count) if areas[number] >= PART * areas[1:].max()]
    return np.isin(labels, kept)
