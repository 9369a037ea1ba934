"""How an expert acts: it goes by its own map of the object, which needs no words.

A map (L, L) of logits is what few images teach best. The first turn clicks into each part of the object that the map
shows and draws a box around all of them; later ones correct the mask where the map is sure of a mistake; and once mask
and map agree, or nothing worth a click is left, it stops.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ibisagent.domain import Action, Box, Click, Mask, Observation, Reply, Stop, standing
from ibisagent.imaging.clicks import bounding_box, interior_depth, next_click
from ibisagent.imaging.masks import iou
from ibisagent.policies.one_by_one import ABSENT_HERE, DONE, FIRST_THOUGHT, LEAKED, MISSED, NOT_THERE, SEGMENTED

SEEN = -2.0  # logit: an object whose map is nowhere above it is called absent
PARTS = 3  # clicks of a first turn into separate parts, the largest first
PART = 0.1  # area of a part, as a share of the largest one's, below which it is a speck
HOLE = 0.25  # depth of what is in the box and surely not object, as a share of the box's shorter side, worth a click
SURE = 1.0  # logit, either way
CORRECTIONS = 2
AGREE = 0.85  # IoU of mask and map


def follow(seen: Observation, region: np.ndarray, name: str) -> Reply:
    """The next reply about the one object of `seen`, whose map is `region`; targets are left unnamed."""
    height, width = seen.image.size
    logits = cv2.resize(region.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    current = np.zeros(seen.image.size, bool)
    for mask in seen.masks.values():
        current |= mask
    if not current.any() and not seen.turns:
        if logits.max() < SEEN:
            return Reply(NOT_THERE.format(name), (Stop(ABSENT_HERE.format(name), (name,)),))
        return Reply(FIRST_THOUGHT.format(name), tuple(_opening(logits)))
    click = _correction(seen, logits, current)
    if click is None:
        return Reply(DONE.format(name), (Stop(SEGMENTED.format(name)),))
    return Reply((MISSED if click.positive else LEAKED).format(name), (click,))


def _opening(logits: np.ndarray) -> list[Action]:
    """A click into each part of what the map shows, a box around it, and a click against what else is in the box."""
    parts = _parts(logits > min(0.0, float(logits.max()) - SURE))
    nothing = np.zeros(logits.shape, bool)
    clicks = [click for part in parts[:PARTS] if (click := next_click(part, nothing, "")) is not None]
    box = bounding_box(np.logical_or.reduce(parts), "")
    assert box is not None  # noqa: S101 - the map has a highest place
    actions: list[Action] = [clicks[0], box, *clicks[1:]]
    if (against := _hole(logits, box)) is not None:
        actions.append(against)
    return actions


def _hole(logits: np.ndarray, box: Box) -> Click | None:
    """A click against what is in the box and surely not the object, where there is much of it."""
    inside = np.zeros(logits.shape, bool)
    inside[box.y0 : box.y1, box.x0 : box.x1] = True
    depth = interior_depth(inside & (logits < -SURE))
    if depth.max() <= HOLE * min(box.x1 - box.x0, box.y1 - box.y0):
        return None
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return Click(int(x), int(y), False, "")


def _correction(seen: Observation, logits: np.ndarray, current: Mask) -> Click | None:
    """The click against the deepest mistake that the map is sure of; None where it is time to stop."""
    if len(seen.turns) > CORRECTIONS or iou(current, logits > 0) >= AGREE:
        return None
    past = [prompt for prompt in standing(seen.turns) if isinstance(prompt, Click)]
    wanted = np.where(np.abs(logits) >= SURE, logits > 0, current)
    return next_click(wanted, current, "", past)


def _parts(region: Mask) -> Sequence[Mask]:
    """The connected parts of a region that are no specks, the largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    order = np.argsort(-areas, kind="stable")
    return [labels == number + 1 for number in order if areas[number] >= PART * areas.max()]
