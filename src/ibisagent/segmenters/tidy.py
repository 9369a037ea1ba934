"""Masks that agree with their prompts: stray components dropped, small holes filled, wrong parts cut off.

Nothing here fights a click: what a positive click touches stays, a hole with a negative click in it stays open.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ibisagent.clicks import deepest_pixel
from ibisagent.domain import Box, Click, Mask, Prompt

SMALL_HOLE = 0.02  # of the mask's area
EDGE_COST = 20.0  # pixels that a strong edge is worth when a mask is divided between clicks


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


def cut_off(mask: Mask, edges: np.ndarray, positives: Sequence[Click], negatives: Sequence[Click]) -> Mask:
    """`mask` without the pixels that are nearer to a negative click than to a positive one, walking inside the mask.

    The way is geodesic: a step costs 1, and up to EDGE_COST more where `edges` (H, W) is high: where objects end.
    Components with negative clicks only go as a whole; where the mask has no positive click at all, its deepest pixel
    stands in for one.
    """
    from skimage.graph import MCP_Geometric

    wrong = [(click.x, click.y) for click in negatives if mask[click.y, click.x]]
    if not wrong:
        return mask
    right = [(click.x, click.y) for click in positives if mask[click.y, click.x]]
    if not right:
        free = mask.astype(np.uint8)
        for point in wrong:
            cv2.circle(free, point, max(2, round(0.05 * max(mask.shape))), 0, cv2.FILLED)
        centre = deepest_pixel(free.astype(bool))
        right = [centre] if centre else []
    strongest = max(float(np.percentile(edges, 95)), 1e-6)
    steps = np.where(mask, 1 + EDGE_COST * np.clip(edges / strongest, 0, 1), -1)  # below 0: no way through
    ways = [
        MCP_Geometric(steps).find_costs([(y, x) for x, y in points])[0] if points else np.full(mask.shape, np.inf)
        for points in (right, wrong)
    ]
    kept: Mask = mask & ((ways[0] < ways[1]) | np.isinf(ways[1]))
    return kept


def edge_strength(pixels: np.ndarray) -> np.ndarray:
    """Gradient magnitude (H, W) float32 of an (H, W, 3) picture, lightly smoothed."""
    grey = cv2.GaussianBlur(pixels.astype(np.float32).mean(axis=2), (0, 0), 1.0)
    strength: np.ndarray = cv2.magnitude(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return strength
