"""Measures of a mask against its target, and of many of them together, each with its definition and source.

A metric over many cases is a quotient of sums, `sum(numerator) / sum(denominator)`: a mean has denominator 1 in every
case, cIoU has the union, F1 twice the hits plus the errors. So every function named `..._share` gives one case's part
of it, None where the case has no part, and `quotient` puts them together. That also lets one bootstrap serve them all.

Two empty masks. Whether "nothing there, nothing found" is worth 1, 0 or nothing is a rule, not a fact (`EmptyRule`):
"one", the default, as in the gIoU of LISA and gRefCOCO; "zero", as code has it that adds an epsilon to the
denominator alone; "skip" leaves the case out. Metrics of the positives only, the cases that do show their object, never
depend on it.

A target of another size than the mask is resized (`resize_target`, nearest neighbour), never the mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import cv2
import numpy as np

from ibisagent.domain import Mask, check_choice
from ibisagent.errors import DataError
from ibisagent.imaging.masks import Overlap, check_same_shape

EmptyRule = Literal["one", "zero", "skip"]
"""What two empty masks are worth; see the module's text."""
Share: TypeAlias = tuple[float, float] | None
"""One case's (numerator, denominator) of a metric; None if the case has no part in it."""

EMPTY_RULE: EmptyRule = "one"
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
MATCH_IOU = 0.5
TOLERANCE_MM = 2.0
GOALS = (0.80, 0.85, 0.90)

SizeClass = Literal["area < 0.5%", "area 0.5% to 5%", "area > 5%"]
SMALL, LARGE = 0.005, 0.05


# ------------------------------------------------------------------------------------------------ metrics over cases


def quotient(shares: Iterable[Share]) -> float | None:
    """The quotient of the sums; None where no case has a part, or the denominators add up to 0."""
    parts = [share for share in shares if share is not None]
    below = sum(part[1] for part in parts)
    return sum(part[0] for part in parts) / below if below else None


def check_empty_rule(rule: str) -> EmptyRule:
    """`rule` as an EmptyRule; ConfigError for anything else."""
    chosen: EmptyRule = check_choice(rule, EmptyRule, "two empty masks cannot count as")
    return chosen


def mean_share(case: Overlap, value: float, empty: EmptyRule = EMPTY_RULE) -> Share:
    """The part of `value`, which two empty masks give their best, in a mean over the cases."""
    if case.union or empty == "one":
        return value, 1.0
    return (0.0, 1.0) if empty == "zero" else None


def ciou_share(case: Overlap) -> Share:
    """cIoU: all intersections over all unions (oIoU of the referring-segmentation papers; Lai et al., LISA, CVPR 2024).

    Large objects dominate it. Two empty masks add nothing to either sum, so no rule is needed.
    """
    return float(case.shared), float(case.union)


def presence_share(case: Overlap) -> Share:
    """Presence F1 = 2 TP / (2 TP + FP + FN), where a case is positive if its target has a pixel, and called so if its
    mask has one (van Rijsbergen 1979; the image-level question of gRefCOCO's N-acc, Liu et al., CVPR 2023).

    Rightly empty masks (true negatives) do not enter it.
    """
    said, there = case.mask > 0, case.target > 0
    return 2.0 * (said and there), float(said) + float(there)


def match_share(case: Overlap, threshold: float = MATCH_IOU) -> Share:
    """Match F1@IoU0.5: as presence F1, but a mask hits only with an IoU of at least `threshold`; one that misses counts
    as found wrongly and as an object not found (detection's rule: Lin et al., COCO, ECCV 2014; Kirillov et al.,
    Panoptic Segmentation, CVPR 2019, with one object per case).
    """
    said, there = case.mask > 0, case.target > 0
    return 2.0 * (said and there and case.iou >= threshold), float(said) + float(there)


# -------------------------------------------------------------------------------------------------- surface distances


@dataclass(frozen=True, slots=True)
class Surfaces:
    """How far the borders of two masks are apart. hd95: in the unit of the spacing; nsd: in [0, 1]."""

    hd95: float
    nsd: float


def surfaces(mask: Mask, target: Mask, spacing: Sequence[float], tolerance: float = TOLERANCE_MM) -> Surfaces:
    """HD95 and NSD of two bool arrays of equal shape; spacing: distance of pixel centres along each axis, as indexed.

    The border of a mask is its pixels that have a neighbour outside (4 neighbours in a plane, 6 in a volume; beyond the
    image is outside), a distance goes from a border pixel's centre to the nearest centre of the other border.

    - HD95: the larger of the two directed 95th percentiles (Huttenlocher et al., PAMI 1993; the percentile as in
      Maier-Hein and Reinke et al., Metrics Reloaded, Nature Methods 2024; MONAI's `compute_hausdorff_distance`).
    - NSD: the share of both borders that lies within `tolerance` of the other one (Nikolov et al., JMIR 2021; counted
      in border pixels as in MONAI's `compute_surface_dice`). Default: TOLERANCE_MM.

    Two empty masks have HD95 0 and NSD 1. If one alone is empty there is no distance: HD95 is then the image's
    diagonal, the largest there can be (the rule of BraTS), and NSD 0. DataError for shapes or spacing that do not fit.
    """
    check_same_shape(mask, target)
    if len(spacing) != mask.ndim or not all(np.isfinite(side) and side > 0 for side in spacing):
        raise DataError(f"spacing {tuple(spacing)} does not fit masks of shape {mask.shape}; give one > 0 per axis")
    if not mask.any() or not target.any():
        if not mask.any() and not target.any():
            return Surfaces(0.0, 1.0)
        return Surfaces(float(np.linalg.norm(np.array(mask.shape) * np.asarray(spacing))), 0.0)
    there, back = _directed(mask, target, spacing), _directed(target, mask, spacing)
    near = np.count_nonzero(there <= tolerance) + np.count_nonzero(back <= tolerance)
    hd95 = max(float(np.percentile(there, 95)), float(np.percentile(back, 95)))
    return Surfaces(hd95, float(near / (there.size + back.size)))


def _directed(mask: Mask, other: Mask, spacing: Sequence[float]) -> np.ndarray:
    """Distances from every border pixel of `mask` to the border of `other`, both with a pixel."""
    from scipy import ndimage

    around = ndimage.find_objects(np.asarray(mask | other, dtype=np.uint8))[0]  # the rest of the image is far away
    mask, other = mask[around], other[around]
    borders = [part & ~ndimage.binary_erosion(part) for part in (mask, other)]
    distances: np.ndarray = ndimage.distance_transform_edt(~borders[1], sampling=spacing)[borders[0]]
    return distances


# ----------------------------------------------------------------------------------------------------- form and clicks


@dataclass(frozen=True, slots=True)
class Noise:
    """What a mask has that its object has not; see `noise`."""

    extra_components: int
    speck_share: float


def noise(mask: Mask, target: Mask) -> Noise:
    """Mask noise, after the "mask noise" of interactive annotation tools: own definition.

    Pixels that touch, also by a corner, are one component. The target has k of them, counted as at least 1.
    extra_components: by how many the mask has more than k, 0 if it has not. speck_share: the share of the mask's pixels
    that lie outside its k largest components, in [0, 1]; 0 for an empty mask.
    """
    check_same_shape(mask, target)
    sizes, allowed = _component_sizes(mask), max(1, len(_component_sizes(target)))
    specks = sizes[allowed:]
    return Noise(len(specks), float(specks.sum() / sizes.sum()) if sizes.size else 0.0)


def _component_sizes(mask: Mask) -> np.ndarray:
    """Pixels of every component, largest first."""
    from scipy import ndimage

    labelled, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    sizes: np.ndarray = np.sort(np.bincount(labelled.ravel())[1:])[::-1]
    return sizes


def clicks_to(goal: float, ious: Sequence[float], cap: int) -> tuple[int, bool]:
    """NoC@goal: (number of clicks until the IoU is at least `goal`, whether that is never the case).

    ious: after each click. A goal never reached counts as `cap` clicks (Sofiiuk et al., Reviving Iterative Training
    with Mask Guidance, ICIP 2022, with GOALS 0.80, 0.85, 0.90 and a cap of 20).
    """
    number = next((number for number, reached in enumerate(ious[:cap], start=1) if reached >= goal), None)
    return (cap, True) if number is None else (number, False)


def resize_target(target: Mask, size: tuple[int, int]) -> Mask:
    """A (H, W) target at `size` (H, W), by nearest neighbour between pixel centres."""
    height, width = size
    resized = cv2.resize(target.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, dtype=bool)


def size_class(area: float) -> SizeClass:
    """The class of an object that covers the share `area` of its image, in [0, 1]."""
    small, medium, large = get_args(SizeClass)
    found: SizeClass = small if area < SMALL else large if area > LARGE else medium
    return found
