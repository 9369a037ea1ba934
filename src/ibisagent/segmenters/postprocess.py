"""Masks that agree with their prompts: stray components dropped, small holes filled, contradicted clicks obeyed.

Nothing here fights a click: what a positive click touches stays, a hole with a negative click in it stays open.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Mask, Prompt
from ibisagent.imaging.clicks import interior_depth

SMALL_HOLE = 0.02  # of the mask's area


def split_prompts(prompts: Sequence[Prompt]) -> tuple[list[Click], list[Click], Box | None]:
    """Positive clicks, negative clicks, and the newest box or None."""
    clicks = [prompt for prompt in prompts if isinstance(prompt, Click)]
    boxes = [prompt for prompt in prompts if isinstance(prompt, Box)]
    positives = [click for click in clicks if click.positive]
    negatives = [click for click in clicks if not click.positive]
    return positives, negatives, boxes[-1] if boxes else None


def keep_prompted(mask: Mask, prompts: Sequence[Prompt], start: Mask | None = None) -> Mask:
    """`mask` without the components that nobody asked for.

    A component stays if a positive click lies in it, if most of it lies in the newest box, or if it touches a part of
    `start` (a mask that was given to be refined) in which no negative click lies. If none would stay, all do.
    """
    positives, negatives, box = split_prompts(prompts)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count <= 2:
        return mask
    wanted = {int(labels[click.y, click.x]) for click in positives}
    if box is not None:
        inside = np.bincount(labels[box.y0 : box.y1, box.x0 : box.x1].ravel(), minlength=count)
        wanted.update(np.flatnonzero(2 * inside > stats[:, cv2.CC_STAT_AREA]).tolist())
    if start is not None:
        _, parts = cv2.connectedComponents(start.astype(np.uint8), connectivity=8)
        refused = [parts[click.y, click.x] for click in negatives]
        wanted.update(np.unique(labels[start & ~np.isin(parts, refused)]).tolist())
    wanted.discard(0)
    return np.isin(labels, list(wanted)) if wanted else mask


def fill_small_holes(mask: Mask, prompts: Sequence[Prompt]) -> Mask:
    """`mask` with its holes filled, where they are under SMALL_HOLE of its area and no negative click lies in them."""
    _, negatives, _ = split_prompts(prompts)
    outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)  # one piece around the picture
    count, labels, stats, _ = cv2.connectedComponentsWithStats(outside, connectivity=4)
    if count <= 2:
        return mask
    small = stats[:, cv2.CC_STAT_AREA] < SMALL_HOLE * np.count_nonzero(mask)
    small[[0, labels[0, 0], *(labels[click.y + 1, click.x + 1] for click in negatives)]] = False
    filled: Mask = mask | small[labels[1:-1, 1:-1]]
    return filled


def obey(mask: Mask, clicks: Sequence[Click], box: Box | None = None) -> Mask:
    """`mask` with every click on its own side, oldest first.

    A click that the mask contradicts turns the largest disc around it that is all wrong: it ends at the mask's border,
    at the picture's, at the newest box, and at the nearest click of the other sign.
    """
    obeyed = mask.copy()
    for click in clicks:
        if obeyed[click.y, click.x] == click.positive:
            continue
        wrong = obeyed != click.positive
        if box is not None and click.positive and box.x0 <= click.x < box.x1 and box.y0 <= click.y < box.y1:
            wrong[: box.y0] = wrong[box.y1 :] = wrong[:, : box.x0] = wrong[:, box.x1 :] = False
        for other in clicks:
            if other.positive != click.positive:
                wrong[other.y, other.x] = False
        wrong[click.y, click.x] = True
        radius = float(interior_depth(wrong)[click.y, click.x])
        y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
        obeyed[(x - click.x) ** 2 + (y - click.y) ** 2 < radius**2] = click.positive
    return obeyed
