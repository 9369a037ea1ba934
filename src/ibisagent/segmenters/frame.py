"""The square frame of a network: pictures and prompts scaled to fit its upper left corner, masks brought back from it.

Training and inference share these functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Prompt

CLICK_RADIUS = 3 / 256  # of the network's side


def letterbox_scale(size: tuple[int, int], side: int) -> float:
    """Network pixels per image pixel when the longer side of a (H, W) image becomes `side`."""
    return side / max(size)


def letterbox_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(rows, columns) that a (H, W) image covers in the frame."""
    scale = letterbox_scale(size, side)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def letterbox(plane: np.ndarray, side: int) -> np.ndarray:
    """An (H, W[, C]) array scaled so that its longer side is `side`, zero-padded at bottom and right to a square."""
    height, width = letterbox_size(plane.shape[:2], side)
    shrinks = max(plane.shape[:2]) > side
    resized = cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    padding = [(0, side - height), (0, side - width)] + [(0, 0)] * (plane.ndim - 2)
    return np.pad(resized, padding)


def unletterbox(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A (side, side) float array of the frame on the grid of its (H, W) image: padding cut off first, then bilinear."""
    height, width = letterbox_size(size, plane.shape[0])
    cut = np.ascontiguousarray(plane[:height, :width])
    return cv2.resize(cut, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def prompt_maps(prompts: Sequence[Prompt], side: int, scale: float) -> np.ndarray:
    """The three prompt planes, (3, side, side) float32 in {0, 1}: positive discs, negative discs, box.

    Prompts are in image pixels; scale is network pixels per image pixel (`letterbox_scale`). The newest box counts.
    """
    maps = np.zeros((3, side, side), dtype=np.float32)
    radius = max(1, round(CLICK_RADIUS * side))
    for prompt in prompts:
        if isinstance(prompt, Click):
            centre = (int((prompt.x + 0.5) * scale), int((prompt.y + 0.5) * scale))
            cv2.circle(maps[0 if prompt.positive else 1], centre, radius, 1.0, cv2.FILLED)
        elif isinstance(prompt, Box):
            x0, y0 = int(prompt.x0 * scale), int(prompt.y0 * scale)
            x1, y1 = max(x0 + 1, round(prompt.x1 * scale)), max(y0 + 1, round(prompt.y1 * scale))
            maps[2] = 0
            maps[2, y0:y1, x0:x1] = 1
    return maps
