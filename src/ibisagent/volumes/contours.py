"""Masks of a slice as closed polygons, and polygons as masks: exact in both directions.

Polygons run along the edges between pixels, so that their area is the mask's own and every pixel's centre lies at least
half a pixel inside or outside: any reader that asks which centres are inside gets the very same mask. Points are (x, y)
in pixels, with pixel (0, 0) from -0.5 to 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ibisagent.domain import Mask

_Point = tuple[int, int]


def polygons(mask: Mask) -> list[np.ndarray]:
    """The parts of a (H, W) mask, each as one closed polygon (N, 2), the last point not repeated.

    A hole is joined to what surrounds it by a channel without width (DICOM's keyhole, PS3.3 C.8.8.6.3), so a part with
    holes is one polygon as well. Pixels that only touch at a corner are different parts, or sides of a hole.
    """
    loops = _loops(mask)
    merged = [loop for loop in loops if _area(loop) > 0]
    holes = sorted((loop for loop in loops if _area(loop) < 0), key=min)
    for hole in holes:
        _join(merged, hole)
    return [_corners(loop) - 0.5 for loop in merged]


def filled(outlines: Iterable[np.ndarray], size: tuple[int, int]) -> Mask:
    """The (H, W) mask of the pixels whose centres lie inside an odd number of the polygons `outlines`, each (N, 2)."""
    height, width = size
    crossed = np.zeros((height, width + 1), np.int64)  # by pixel: edges between it and the one to its left
    for outline in outlines:
        ends = np.roll(outline, -1, axis=0)
        for (x0, y0), (x1, y1) in zip(outline, ends, strict=True):
            if y0 == y1:
                continue
            low, high = sorted((y0, y1))
            rows = np.arange(max(0, int(np.ceil(low))), min(height, int(np.ceil(high))))
            columns = np.ceil(x0 + (rows - y0) * (x1 - x0) / (y1 - y0))
            np.add.at(crossed, (rows, np.clip(columns, 0, width).astype(np.intp)), 1)
    inside: Mask = np.cumsum(crossed, axis=1)[:, :width] % 2 == 1
    return inside


def _loops(mask: Mask) -> list[list[_Point]]:
    """The boundaries of a mask in steps of one pixel's edge, between corners (x, y): around parts with positive area,
    around holes with negative. Where two pixels touch at a corner only, the boundary keeps to the same pixel."""
    padded = np.pad(mask.astype(np.int8), 1)
    down, across = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    steps: dict[_Point, list[_Point]] = {}
    for (y, x), into in zip(np.argwhere(down), down[down != 0], strict=True):
        start, way = ((x, y), (1, 0)) if into > 0 else ((x + 1, y), (-1, 0))
        steps.setdefault((int(start[0]), int(start[1])), []).append(way)
    for (y, x), into in zip(np.argwhere(across), across[across != 0], strict=True):
        start, way = ((x, y + 1), (0, -1)) if into > 0 else ((x, y), (0, 1))
        steps.setdefault((int(start[0]), int(start[1])), []).append(way)
    loops = []
    while steps:
        start = next(iter(steps))
        loop, point, way = [start], start, steps[start][0]
        while True:
            ways = steps[point]
            turned = (-way[1], way[0])  # towards the inside, which lies on the right of the way with y going down
            way = turned if turned in ways else ways[0]
            ways.remove(way)
            if not ways:
                del steps[point]
            point = point[0] + way[0], point[1] + way[1]
            if point == start and not (point in steps and (-way[1], way[0]) in steps[point]):
                break
            loop.append(point)
        loops.append(loop)
    return loops


def _join(merged: list[list[_Point]], hole: list[_Point]) -> None:
    """Put a hole into the polygon that lies to the left of its leftmost corner."""
    x, y = corner = min(hole)
    owners = {point: (loop, place) for loop in merged for place, point in enumerate(loop) if point[1] == y}
    while (x, y) not in owners:
        x -= 1
    loop, place = owners[x, y]
    begin = hole.index(corner)
    around = [*hole[begin:], *hole[:begin], corner]
    channel = [(column, y) for column in range(x + 1, corner[0])]
    if (x, y) == corner:
        around, channel = around[1:], []
    loop[place + 1 : place + 1] = [*channel, *around, *channel[::-1], *([(x, y)] if (x, y) != corner else [])]


def _area(loop: list[_Point]) -> float:
    points = np.array(loop, dtype=float)
    after = np.roll(points, -1, axis=0)
    return float((points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]).sum() / 2)


def _corners(loop: list[_Point]) -> np.ndarray:
    """(N, 2) without the points between which the way goes straight on."""
    points = np.array(loop, dtype=float)
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turning: np.ndarray = points[(before != after).any(axis=1)]
    return turning
