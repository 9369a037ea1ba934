"""What `ibis-nano` is given: places as tokens, and images as planes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from ibisagent.segmenters.backbone_sizes import SIDE

TOKENS_PER_IMAGE = 64  # 8 x 8
LOCATIONS = 64  # places per axis
NEAR = 2.0  # cells: how far from the right place a place is still worth something
_POINT = re.compile(r"\(\s*([01]?\.\d{1,12}|[01])\s*,\s*([01]?\.\d{1,12}|[01])\s*\)")


def location_text(column: int, row: int) -> str:
    """The token of a grid cell, as text: its centre in [0, 1] coordinates, (x, y)."""
    return f"({(column + 0.5) / LOCATIONS:.3f}, {(row + 0.5) / LOCATIONS:.3f})"


def snap_locations(text: str) -> str:
    """`text` with every (x, y) moved to the centre of its grid cell, so that it is one token."""

    def snap(match: re.Match[str]) -> str:
        column, row = (min(int(float(number) * LOCATIONS), LOCATIONS - 1) for number in match.groups())
        return location_text(column, row)

    return _POINT.sub(snap, text)


def image_planes(image: Any) -> np.ndarray:
    """(4, SIDE, SIDE) float32 in [0, 1] of an image (Pillow or array, RGB or RGBA); alpha of RGB is 0."""
    pillow = image if isinstance(image, PillowImage.Image) else PillowImage.fromarray(np.asarray(image))
    alpha = pillow.getchannel("A") if pillow.mode == "RGBA" else PillowImage.new("L", pillow.size)
    square = (SIDE, SIDE)
    # Reduce by area first where it pays; colour and mask are resized apart, as alpha here is not transparency.
    colour = np.asarray(pillow.convert("RGB").resize(square, PillowImage.Resampling.BILINEAR, reducing_gap=2.0))
    mask = np.asarray(alpha.resize(square, PillowImage.Resampling.BILINEAR))
    return np.concatenate([colour, mask[..., None]], axis=2).transpose(2, 0, 1).astype(np.float32) / 255
