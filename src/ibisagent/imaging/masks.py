"""Measures on masks, and the only run-length codec. Masks are (H, W) bool arrays of equal shape."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from ibisagent.domain import Mask
from ibisagent.errors import DataError
from ibisagent.imaging import limits

_BLOCK = 2**16
_CHUNKS = 8  # of five bits: more than any run within the limits needs


def check_same_shape(a: Mask, b: Mask) -> None:
    """Raise DataError unless both masks have the same shape."""
    if a.shape != b.shape:
        raise DataError(
            f"masks of different size: {a.shape} and {b.shape}; resize the ground truth with nearest neighbour"
        )


@dataclass(frozen=True, slots=True)
class Overlap:
    """Pixels (or voxels) of one mask and its target: all that the overlap measures need.

    Sums over multiple targets of one case are allowed: `a + b`.
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


def expected_iou(mask: Mask, belief: np.ndarray) -> float:
    """The IoU in [0, 1] of a mask (H, W) with an object of which only the belief is known: probabilities (L, M) that
    places of the same image belong to it. Expected intersection over expected union; the mask is reduced by area.
    """
    share = cv2.resize(mask.astype(np.float32), belief.shape[::-1], interpolation=cv2.INTER_AREA)
    shared = float((share * belief).sum())
    union = float(share.sum() + belief.sum()) - shared
    return shared / union if union > 0 else 1.0


def dice(a: Mask, b: Mask) -> float:
    """Dice coefficient, 2 |a & b| / (|a| + |b|), in [0, 1]; two empty masks agree fully (1.0)."""
    return overlap(a, b).dice


CORRUPTIONS = ("erode", "dilate", "shift", "add", "cut")


def corrupt(mask: Mask, kind: str, radius: int, at: tuple[int, int], move: tuple[float, float]) -> Mask:
    """A mask with a typical mistake of `radius` pixels.

    kind: of CORRUPTIONS; "shift" moves it by `move` (x, y), "add" and "cut" a disc of twice the radius around `at`
    (x, y).
    """
    plane: np.ndarray = mask.astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    if kind in ("erode", "dilate"):
        plane = cv2.erode(plane, kernel) if kind == "erode" else cv2.dilate(plane, kernel)
    elif kind == "shift":
        moved = np.array([[1, 0, move[0]], [0, 1, move[1]]], dtype=np.float32)
        plane = cv2.warpAffine(plane, moved, plane.shape[::-1], flags=cv2.INTER_NEAREST)
    else:
        cv2.circle(plane, at, 2 * radius, int(kind == "add"), cv2.FILLED)
    corrupted: Mask = plane > 0
    return corrupted


def encode_rle(mask: Mask) -> dict[str, Any]:
    """COCO run-length encoding: {"size": [H, W], "counts": ASCII text}, column-major, compressed (COCO API format)."""
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.size == 0:
        raise DataError(f"run-length encoding needs a (H, W) bool mask with pixels, got {mask.shape} {mask.dtype}")
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def rle_area(rle: Mapping[str, Any]) -> int:
    """How many pixels a mask has that `encode_rle` encoded; it is not decoded."""
    return int(coco.area({"size": list(rle["size"]), "counts": rle["counts"].encode("ascii")}))


def rle_box(rle: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """The smallest box around a mask that `encode_rle` encoded: left, top, width, height in pixels; 0 where empty."""
    x, y, width, height = coco.toBbox({"size": list(rle["size"]), "counts": rle["counts"].encode("ascii")})
    return int(x), int(y), int(width), int(height)


def decode_rle(rle: Mapping[str, Any]) -> Mask:
    """The (H, W) bool mask that `encode_rle` encoded.

    Raises TooLargeError for a size beyond the limits, DataError for anything else: missing parts, no pixels, counts
    that are cut off, altered or do not fill the size. Extra keys are ignored.
    """
    try:
        counts = rle["counts"].encode("ascii")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("run-length mask needs 'size' [H, W] and 'counts' text: the record is damaged") from error
    return _drawn(rle, _coded_runs(counts))


def decode_runs(rle: Mapping[str, Any]) -> Mask:
    """As `decode_rle`, but also takes COCO's plain form, in which "counts" is a list of whole numbers."""
    try:
        counts = rle["counts"]
        if not isinstance(counts, list):
            return decode_rle(rle)
        runs = np.array([operator.index(run) for run in counts], dtype=np.int64)
    except (KeyError, TypeError, OverflowError) as error:
        raise DataError("run-length mask needs 'size' [H, W] and 'counts': the record is damaged") from error
    return _drawn(rle, [runs[start : start + _BLOCK] for start in range(0, len(runs), _BLOCK)])


def _drawn(rle: Mapping[str, Any], blocks: Iterable[np.ndarray]) -> Mask:
    """The mask of runs that are outside and inside by turns, checked block by block before they are drawn."""
    try:
        height, width = (operator.index(side) for side in rle["size"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("run-length mask needs 'size' [H, W] and 'counts' text: the record is damaged") from error
    if not (0 < height < 2**31 and 0 < width < 2**31):
        raise DataError("run-length mask states an impossible size: the record is damaged")
    limits.check_pixels(height, width, "run-length mask")
    flat = np.zeros(height * width, dtype=bool)
    at = count = 0
    for runs in blocks:
        left = len(flat) - at
        if runs.min() < 0 or runs.max() > left or runs.sum() > left:
            at = -1
            break
        end = at + int(runs.sum())
        flat[at:end] = np.repeat(np.arange(count, count + len(runs)) % 2 == 1, runs)
        at, count = end, count + len(runs)
    if at != len(flat):
        raise DataError(f"run-length mask does not fill its size {height} x {width}: the record is damaged")
    mask: Mask = flat.reshape((height, width), order="F")
    return mask


def _coded_runs(counts: bytes) -> Iterator[np.ndarray]:
    """The runs of COCO's compressed counts, block by block; one of -1 where they are malformed.

    Each run is written in chunks of five bits, low first (bit 5: another follows, bit 4 of the last: sign), and from
    the fourth run on as the difference to the run before the last.
    """
    start = number = 0
    before = [0, 0]  # the last run of even and of odd number
    while start < len(counts):
        chunks = np.frombuffer(counts, np.uint8, min(_BLOCK, len(counts) - start), start).astype(np.int64) - 48
        ends = np.flatnonzero(chunks & 32 == 0)
        if not len(ends) or chunks.min() < 0 or chunks.max() > 63:
            yield np.array([-1])
            return
        chunks = chunks[: ends[-1] + 1]
        firsts = np.append(0, ends[:-1] + 1)
        lengths = ends - firsts + 1
        if lengths.max() > _CHUNKS:
            yield np.array([-1])
            return
        places = np.arange(len(chunks)) - np.repeat(firsts, lengths)
        runs = np.add.reduceat((chunks & 31) << 5 * places, firsts)
        runs -= np.where(chunks[ends] & 16, 1 << 5 * lengths, 0)
        absolute = 1 if number == 0 else 0  # the first run of all is no part of the sums
        for first in (absolute, absolute + 1):
            if first < len(runs):
                parity = (number + first) % 2
                runs[first::2] = before[parity] + np.cumsum(runs[first::2])
                before[parity] = int(runs[first::2][-1])
        yield runs
        start, number = start + len(chunks), number + len(runs)
