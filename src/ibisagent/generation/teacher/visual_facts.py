"""What can be seen at one turn, as text: sizes, places, brightness. The numbers behind them stay here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Image, Mask, Masks, Prompt, Reply, Stop
from ibisagent.imaging.clicks import bounding_box
from ibisagent.imaging.masks import iou

TurnKind = Literal["first", "missed", "leaked", "wrong", "undo", "done", "absent", "words", "unrelated", "claim"]
WELL_COVERED = 0.91


@dataclass(frozen=True, slots=True)
class VisualFacts:
    """One object at one turn. Texts are "" where nothing certain can be said.

    place: of the click or object in the image; side: of the click within the object; extent: how large the error or
    object is; tone: brightness against the surroundings; contrast: brightness of an error against the object's rest.
    """

    name: str
    turn_kind: TurnKind
    place: str = ""
    side: str = ""
    extent: str = ""
    tone: str = ""
    shape: str = ""
    contrast: str = ""
    boxed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TeacherContext:
    """All that a teacher gets for one thought: the question, the right reply without its thought, what is to be seen.

    image, masks: what the student sees. claim: what the user said that is not so. key: makes draws repeatable.
    """

    key: str
    query: str
    kind: str
    reply: Reply
    visuals: tuple[VisualFacts, ...]
    image: Image
    masks: Masks
    claim: str = ""
    modality: str = ""


def place_of(x: float, y: float, size: tuple[int, int]) -> str:
    """Where a point lies in an image of `size` (H, W), as text of three columns and three rows."""
    column = min(int(3 * x / size[1]), 2)
    row = min(int(3 * y / size[0]), 2)
    if (row, column) == (1, 1):
        return "in the middle of the picture"
    vertical, horizontal = ("upper", "", "lower")[row], ("left", "", "right")[column]
    if vertical and horizontal:
        return f"in the {vertical} {horizontal} of the picture"
    return f"in the {vertical} part of the picture" if vertical else f"on the {horizontal} of the picture"


def side_of(x: float, y: float, around: Mask) -> str:
    """Where a point lies within the extent of `around`: "on the left", "at the lower right", ... or "in the middle"."""
    box = bounding_box(around, "")
    if box is None:
        return ""
    across = (x + 0.5 - (box.x0 + box.x1) / 2) / ((box.x1 - box.x0) / 2)
    down = (y + 0.5 - (box.y0 + box.y1) / 2) / ((box.y1 - box.y0) / 2)
    horizontal = "left" if across < -0.35 else "right" if across > 0.35 else ""
    vertical = "top" if down < -0.35 else "bottom" if down > 0.35 else ""
    if horizontal and vertical:
        return f"at the {'upper' if vertical == 'top' else 'lower'} {horizontal}"
    if horizontal:
        return f"on the {horizontal}"
    return f"at the {vertical}" if vertical else "in the middle"


def _grey(image: Image) -> np.ndarray:
    """(H, W) uint8 brightness."""
    grey: np.ndarray = cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY)
    return grey


def _ring(region: Mask) -> Mask:
    """The pixels just outside `region`, as wide as a tenth of its extent."""
    width = max(2, int(0.1 * np.sqrt(np.count_nonzero(region))))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    ring: Mask = (cv2.dilate(region.astype(np.uint8), kernel) > 0) & ~region
    return ring


def object_facts(name: str, image: Image, ground_truth: Mask) -> dict[str, str]:
    """place, extent, tone and shape of a whole object; only what is clear."""
    box = bounding_box(ground_truth, "")
    if box is None:
        return {}
    moments = cv2.moments(ground_truth.astype(np.uint8), binaryImage=True)
    centre_x, centre_y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    share = float(np.count_nonzero(ground_truth)) / ground_truth.size
    extent = "tiny" if share < 0.005 else "small" if share < 0.03 else "large" if share > 0.15 else ""
    pieces = int(cv2.connectedComponents(ground_truth.astype(np.uint8))[0]) - 1
    wide, high = box.x1 - box.x0, box.y1 - box.y0
    filled = np.count_nonzero(ground_truth) / (wide * high)
    shape = ""
    if pieces == 1 and filled > 0.68:
        ratio = wide / high
        shape = "wide" if ratio > 1.7 else "tall" if ratio < 0.6 else "roundish" if 0.8 < ratio < 1.25 else "oval"
    compact = pieces == 1 and wide * high < 0.5 * ground_truth.size
    place = place_of(centre_x, centre_y, image.size) if compact else ""
    return {"place": place, "extent": extent, "tone": _tone(image, ground_truth), "shape": shape}


def _tone(image: Image, region: Mask) -> str:
    grey, ring = _grey(image), _ring(region)
    if not ring.any():
        return ""
    gap = float(grey[region].mean()) - float(grey[ring].mean())
    return "brighter" if gap > 20 else "darker" if gap < -20 else ""


def first_facts(name: str, image: Image, ground_truth: Mask, prompt: Prompt) -> VisualFacts:
    """What is seen before the first prompt on an object."""
    facts = object_facts(name, image, ground_truth)
    if isinstance(prompt, Click) and not facts.get("place"):
        central = side_of(prompt.x, prompt.y, ground_truth) == "in the middle"
        facts = {**facts, "side": "in its middle" if central else ""}
    return VisualFacts(name, "first", boxed=isinstance(prompt, Box), **facts)


def error_facts(name: str, image: Image, ground_truth: Mask, current: Mask, prompt: Prompt) -> VisualFacts:
    """What is seen of the error that `prompt` corrects: a missed part, or a leak."""
    if isinstance(prompt, Box):
        return VisualFacts(name, "missed", boxed=True)
    error = ground_truth & ~current if prompt.positive else current & ~ground_truth
    _, parts = cv2.connectedComponents(error.astype(np.uint8), connectivity=4)
    part = parts == parts[prompt.y, prompt.x] if error[prompt.y, prompt.x] else error
    whole = int(np.count_nonzero(ground_truth if prompt.positive else current))
    share = float(np.count_nonzero(part)) / max(whole, 1)
    extent = "a little" if share < 0.04 else "a part" if share < 0.3 else "much"
    side = side_of(prompt.x, prompt.y, ground_truth | current)
    grey, right = _grey(image), ground_truth & current
    contrast = ""
    if part.any() and np.count_nonzero(right) > 20:
        gap = float(grey[part].mean()) - float(grey[right].mean())
        if abs(gap) < 8:
            contrast = "alike"
        elif abs(gap) > 20:
            contrast = "brighter" if gap > 0 else "darker"
    detached = not prompt.positive and not (cv2.dilate(part.astype(np.uint8), np.ones((3, 3))) > 0)[right].any()
    return VisualFacts(
        name,
        "missed" if prompt.positive else "leaked",
        place_of(prompt.x, prompt.y, image.size),
        side,
        extent,
        shape="detached" if detached else "",
        contrast=contrast,
    )


def stop_facts(stop: Stop, masks: Masks, ground_truths: Masks) -> tuple[VisualFacts, ...]:
    """What is seen at the end; extent "nearly" for a mask that leaves something to be wished for."""
    nearly = {
        name for name, mask in masks.items() if name in ground_truths and iou(mask, ground_truths[name]) < WELL_COVERED
    }
    done = [
        VisualFacts(name, "done", extent="nearly" if name in nearly else "")
        for name, mask in masks.items()
        if mask.any() and name not in stop.absent
    ]
    return (*done, *(VisualFacts(name, "absent") for name in stop.absent))
