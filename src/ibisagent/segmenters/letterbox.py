"""The square frame of a network: images and prompts scaled to fit its upper left corner, masks brought back from it.

Training and inference share these functions. The network itself, in `click_network`, needs torch; this does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Mask, Prompt

CLICK_RADIUS = 3 / 256  # of the network's side
NEARLY_ALL = 0.8  # of the image's longer side: a window as large as that is the whole image
CHANNELS = 7  # RGB, previous mask probability, positive clicks, negative clicks, box


@dataclass(frozen=True)
class ClickNetworkConfig:
    """side: network resolution in pixels. widths: channels at strides 2, 4, 8, 16, 32. depth: blocks per stage."""

    side: int = 256
    widths: tuple[int, ...] = (32, 64, 128, 192, 256)
    depth: tuple[int, ...] = (1, 2, 2, 2, 2)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready form, as stored beside the weights."""
        return asdict(self)


def letterbox_scale(size: tuple[int, int], side: int) -> float:
    """Network pixels per image pixel when the longer side of a (H, W) image becomes `side`."""
    return side / max(size)


def letterbox_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(rows, columns) that a (H, W) image covers in the letterbox."""
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
    """A (side, side) float array of the letterbox on the grid of its (H, W) image: padding cut off first, then
    bilinear."""
    height, width = letterbox_size(size, plane.shape[0])
    crop = np.ascontiguousarray(plane[:height, :width])
    return cv2.resize(crop, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


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


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of image pixels that a network looks at: columns x0 to x1, rows y0 to y1, half-open."""

    x0: int
    y0: int
    x1: int
    y1: int

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Window:
        """All of a (H, W) image."""
        return cls(0, 0, size[1], size[0])

    @classmethod
    def around(cls, extent: Window, size: tuple[int, int], margin: float, smallest: float) -> Window:
        """A square of `margin` times the longer side of `extent`, around it, moved and cut to lie in a (H, W) image.

        It is at least `smallest` of the image's longer side; if that leaves little out, it is the whole image.
        """
        longest = max(size)
        side = round(max(margin * max(extent.x1 - extent.x0, extent.y1 - extent.y0), smallest * longest))
        if side > NEARLY_ALL * longest:
            return cls.whole(size)
        x0, x1 = _span(extent.x0, extent.x1, side, size[1])
        y0, y1 = _span(extent.y0, extent.y1, side, size[0])
        return cls(x0, y0, x1, y1)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.y1 - self.y0, self.x1 - self.x0

    def crop(self, plane: np.ndarray) -> np.ndarray:
        """The part of an (H, W[, C]) array that lies in the window; a view."""
        return plane[self.y0 : self.y1, self.x0 : self.x1]

    def scaled(self, scale: float, size: tuple[int, int]) -> Window:
        """The same window on a (H, W) grid with `scale` times as many pixels a side; never empty."""
        x0, y0 = min(int(self.x0 * scale), size[1] - 1), min(int(self.y0 * scale), size[0] - 1)
        x1, y1 = round(self.x1 * scale), round(self.y1 * scale)
        return Window(x0, y0, min(max(x1, x0 + 1), size[1]), min(max(y1, y0 + 1), size[0]))

    def moved(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts in the window's own pixels: clicks outside it are left out, boxes are cut to it."""
        inside: list[Prompt] = []
        for prompt in prompts:
            if isinstance(prompt, Click):
                if self.x0 <= prompt.x < self.x1 and self.y0 <= prompt.y < self.y1:
                    inside.append(Click(prompt.x - self.x0, prompt.y - self.y0, prompt.positive, prompt.target))
                continue
            x0, x1 = max(prompt.x0, self.x0) - self.x0, min(prompt.x1, self.x1) - self.x0
            y0, y1 = max(prompt.y0, self.y0) - self.y0, min(prompt.y1, self.y1) - self.y0
            if x0 < x1 and y0 < y1:
                inside.append(Box(x0, y0, x1, y1, prompt.target))
        return inside

    def truncates(self, mask: Mask, size: tuple[int, int]) -> bool:
        """Whether `mask`, given on the window's pixels, runs into a side of it that is no side of the (H, W) image."""
        sides = (
            (self.y0 > 0, mask[0]),
            (self.y1 < size[0], mask[-1]),
            (self.x0 > 0, mask[:, 0]),
            (self.x1 < size[1], mask[:, -1]),
        )
        return any(inner and bool(border.any()) for inner, border in sides)


def _span(low: int, high: int, side: int, length: int) -> tuple[int, int]:
    """`side` pixels around low to high, within 0 to length."""
    if side >= length:
        return 0, length
    start = min(max(round((low + high - side) / 2), 0), length - side)
    return start, start + side
