"""Masks that agree with their prompts: clicks that a mask contradicts are obeyed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ibisagent.domain import Box, Click, Mask, Prompt
from ibisagent.imaging.clicks import interior_depth


def split_prompts(prompts: Sequence[Prompt]) -> tuple[list[Click], list[Click], Box | None]:
    """Positive clicks, negative clicks, and the newest box or None."""
    clicks = [prompt for prompt in prompts if isinstance(prompt, Click)]
    boxes = [prompt for prompt in prompts if isinstance(prompt, Box)]
    positives = [click for click in clicks if click.positive]
    negatives = [click for click in clicks if not click.positive]
    return positives, negatives, boxes[-1] if boxes else None


def obey(mask: Mask, clicks: Sequence[Click], box: Box | None = None) -> Mask:
    """`mask` with every click on its own side, oldest first.

    A click that the mask contradicts turns the largest disc around it that is all wrong: it ends at the mask's border,
    at the image's, at the newest box, and at the nearest click of the other sign.
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
