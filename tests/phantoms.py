"""Images drawn in code, never square; volumes are in `volume_phantoms`."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

from ibisagent.domain import Mask

SIZE = (61, 83)  # height, width


def disc(x: int, y: int, radius: int, size: tuple[int, int] = SIZE) -> Mask:
    """(H, W) bool: the pixels at most `radius` away from column x and row y."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    inside: Mask = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    return inside


def box_mask(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = SIZE) -> Mask:
    """(H, W) bool: columns x0 to x1, rows y0 to y1, without the last."""
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def bright_box(shift: int = 0, shade: int = 200, size: tuple[int, int] = SIZE, noise: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: a box, `shift` pixels further down, on a dark ground; noise: side of a square of it."""
    pixels = np.full((*size, 3), 30, dtype=np.uint8)
    pixels[:noise, :noise] = np.random.default_rng(0).integers(0, 255, (noise, noise, 3))
    pixels[10 + shift : 30 + shift, 12:40] = shade
    return pixels


def png(pixels: np.ndarray) -> bytes:
    """A PNG file."""
    encoded = io.BytesIO()
    PIL.Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()
