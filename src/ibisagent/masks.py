"""Measures on masks, and the only run-length codec. Masks are (H, W) bool arrays of equal shape."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from ibisagent.domain import MAX_PIXELS, Mask
from ibisagent.errors import DataError


def check_same_shape(a: Mask, b: Mask) -> None:
    """Raise DataError unless both masks have the same shape."""
    if a.shape != b.shape:
        raise DataError(f"masks of different size: {a.shape} and {b.shape}; resize the truth with nearest neighbour")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Pixels (or voxels) of one mask and its target: all that the overlap measures need.

    Sums over several targets of one case are allowed: `a + b`.
    """

    shared: int
    mask: int
    target: int

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.shared + other.shared, self.mask + other.mask, self.target + other.target)

    @property
    def union(self) -> int:
        """Pixels of mask or target."""
        return self.mask + self.target - self.shared

    @property
    def iou(self) -> float:
        """Intersection over union (Jaccard 1912) in [0, 1]; two empty masks give 1."""
        return self.shared / self.union if self.union else 1.0

    @property
    def dice(self) -> float:
        """2 |A & B| / (|A| + |B|) (Dice 1945; the F1 of the pixels) in [0, 1]; two empty masks give 1."""
        total = self.mask + self.target
        return 2 * self.shared / total if total else 1.0


def overlap(mask: Mask, target: Mask) -> Overlap:
    """Count two bool arrays of equal shape, any number of dimensions. DataError for shapes that differ."""
    check_same_shape(mask, target)
    shared = int(np.count_nonzero(mask & target))
    return Overlap(shared, int(np.count_nonzero(mask)), int(np.count_nonzero(target)))


def iou(a: Mask, b: Mask) -> float:
    """Intersection over union in [0, 1]; two empty masks agree fully (1.0)."""
    return overlap(a, b).iou


def dice(a: Mask, b: Mask) -> float:
    """Dice coefficient, 2 |a & b| / (|a| + |b|), in [0, 1]; two empty masks agree fully (1.0)."""
    return overlap(a, b).dice


def encode_rle(mask: Mask) -> dict[str, Any]:
    """COCO run-length encoding: {"size": [H, W], "counts": ASCII text}, column-major, compressed (COCO API format)."""
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.size == 0:
        raise DataError(f"run-length encoding needs a (H, W) bool mask with pixels, got {mask.shape} {mask.dtype}")
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> Mask:
    """The (H, W) bool mask that `encode_rle` encoded.

    Raises DataError for anything else: missing parts, a size without pixels or above MAX_PIXELS, counts that are cut
    off, altered or do not fill the size. Extra keys are ignored.
    """
    try:
        height, width = (operator.index(side) for side in rle["size"])
        counts = rle["counts"].encode("ascii")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("run-length mask needs 'size' [H, W] and 'counts' text: the record is damaged") from error
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError("run-length mask states an impossible size: the record is damaged")
    if _run_total(counts) != height * width:
        raise DataError(f"run-length mask does not fill its size {height} x {width}: the record is damaged")
    mask: Mask = coco.decode({"size": [height, width], "counts": counts}).astype(bool)
    return mask


def _run_total(counts: bytes) -> int:
    """Sum of the runs in COCO's compressed counts, -1 if malformed; checked first, as the C decoder trusts its input.

    Each run is written in chunks of five bits, low first (bit 5: another follows, bit 4 of the last: sign), and from
    the fourth run on as the difference to the run before the last. Six chunks hold every run up to MAX_PIXELS; more
    would overflow the C decoder's int.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for byte in counts:
        chunk = byte - 48
        if not 0 <= chunk < 64 or shift > 25:
            return -1
        value |= (chunk & 0x1F) << shift
        shift += 5
        if chunk & 0x20:
            continue
        if chunk & 0x10:
            value |= -1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            return -1
        runs.append(value)
        value, shift = 0, 0
    return -1 if shift else sum(runs)
