"""The square frame of a network: pictures scaled to fit its upper left corner, and masks brought back from it."""

from __future__ import annotations

import cv2
import numpy as np


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
