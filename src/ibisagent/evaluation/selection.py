"""Which unlabelled images to label next: those about which the agent is most in doubt, and unlike those there are.

One image after another is taken, each time that for which the product of two numbers is largest: the doubt (1 - the
expected IoU of the agent's mask, see `reliability`) and the distance of its features to the nearest image that is
labelled or was taken before (greedy k-centres: Gonzalez 1985; Sener and Savarese, core sets, 2018). So neither ten
images of one hard case are chosen nor outliers that the agent masters. Ties go to the first name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from ibisagent.datasets import IMAGE_SUFFIXES, CaseSource
from ibisagent.domain import Image
from ibisagent.errors import DataError, IbisError
from ibisagent.evaluation.reliability import Queue, Reviewer
from ibisagent.inference.api import DEFAULT_POLICY, DEFAULT_SEGMENTER
from ibisagent.inference.image import read_case, run_case
from ibisagent.policies import load_policy
from ibisagent.policies.base import Policy, Seeing
from ibisagent.segmenters import Segmenter, load_segmenter

MIN_DOUBT = 0.05  # of a mask that seems perfect: between two of those, the one that is more unlike the rest comes first
_THUMBNAIL_SIDE = 16
_ALIKE, _UNLIKE = 0.3, 0.7  # distances from which on a reason says so


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that nobody has labelled. reliability: the expected IoU of the agent's mask, in [0, 1]. features (F,):
    of the image, see `features_of`."""

    name: str
    reliability: float
    features: np.ndarray


@dataclass(frozen=True, slots=True)
class Suggestion:
    """An image to label. distance: to the nearest that is labelled or comes before it, in [0, 1]; None where there is
    none. reason: both numbers as text."""

    name: str
    reliability: float
    distance: float | None
    reason: str


def choose(candidates: Sequence[Candidate], count: int, labelled: Sequence[np.ndarray] = ()) -> list[Suggestion]:
    """The `count` images to label next, in the order in which to label them; fewer where there are fewer.

    labelled: features (F,) of the images that have labels. The same input gives the same answer, in whatever order the
    candidates come.
    """
    left = sorted(candidates, key=lambda one: one.name)
    if not left:
        return []
    points = _comparable(np.array([*(one.features for one in left), *labelled], dtype=np.float64))
    own, known = points[: len(left)], points[len(left) :]
    nearest = np.full(len(left), np.inf)
    for point in known:
        nearest = np.minimum(nearest, _distances(own, point))
    doubt = np.maximum(1 - np.array([one.reliability for one in left]), MIN_DOUBT)
    free = np.ones(len(left), dtype=bool)
    chosen = []
    for _ in range(min(count, len(left))):
        worth = np.where(free, doubt * np.minimum(nearest, 1.0), -1.0)
        # of images that are all copies of what there is, the most doubtful
        best = int(np.lexsort((-doubt, -worth))[0])
        free[best] = False
        distance = None if np.isinf(nearest[best]) else round(float(nearest[best]), 4)
        reliability = round(left[best].reliability, 4)
        chosen.append(Suggestion(left[best].name, reliability, distance, _reason(reliability, distance)))
        nearest = np.minimum(nearest, _distances(own, own[best]))
    return chosen


def features_of(policy: Policy, image: Image) -> np.ndarray:
    """Features (F,) float32 by which images are compared: those that the policy sees; of one that shows none, and for
    all its images alike, a thumbnail's pixels."""
    seen = policy.features(image) if isinstance(policy, Seeing) else None
    if seen is not None:
        return seen
    side = (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
    small: np.ndarray = cv2.resize(image.pixels, side, interpolation=cv2.INTER_AREA).reshape(-1).astype(np.float32)
    return small


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and those below it, by name. DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one with images")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise DataError(f"{folder}: holds no images; give a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return found


def suggest(
    folder: str | Path,
    query: str,
    count: int,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    segmenter: str | Segmenter = DEFAULT_SEGMENTER,
    labelled: CaseSource | None = None,
    on_image: Callable[[Path, IbisError | None], None] = lambda _path, _error: None,
) -> list[Suggestion]:
    """The `count` images of a folder of unlabelled ones to label next: the agent is run on each once, then `choose`.

    Args:
        folder: images, also in folders below it; suggestions name them as seen from it.
        query: what is to be labelled.
        count: how many, at least 1.
        policy: who clicks, as for `load_policy`, or a loaded one.
        segmenter: what turns clicks into masks, as for `load_segmenter`, or a loaded one.
        labelled: pairs that have labels: neither their images, nor copies of these, nor their masks are suggested, and
            what is like them is needed least. One that cannot be read is left out with a warning.
        on_image: told of each image when it is done, with the error of one that cannot be used and is left out.

    Raises:
        DataError: for a folder without images, and where none can be used or is without a label.
        ConfigError, PolicyError, SegmenterError: as the agent raises them.
    """
    folder, paths = Path(folder), images_in(Path(folder))
    agent = load_policy(policy) if isinstance(policy, str) else policy
    engine = load_segmenter(segmenter) if isinstance(segmenter, str) else segmenter
    known: dict[str, np.ndarray] = {}
    masks: set[Path] = set()
    if labelled is not None:
        masks = {row.mask.resolve() for row in labelled.rows if row.mask is not None}
        images = {row.image: replace(row, mask=None, label=None) for row in labelled.rows}.values()
        for _, one in CaseSource(images, labelled.where).readable():
            known[one.image.sha256] = features_of(agent, one.image)
    queue, candidates, without_use = Queue(Reviewer(agent, engine)), [], 0
    for path in paths:
        if path.resolve() in masks:
            on_image(path, None)
            continue
        try:
            case = read_case(path, query)
        except DataError as error:
            without_use += 1
            on_image(path, error)
            continue
        if case.image.sha256 not in known:
            episode = run_case(case, agent, engine)
            name = path.relative_to(folder).as_posix()
            candidates.append(Candidate(name, queue.add(name, episode, case), features_of(agent, case.image)))
        on_image(path, None)
    if not candidates and without_use:
        raise DataError(f"{folder}: none of its images without a label can be used; convert them first")
    if not candidates:
        raise DataError(f"{folder}: all of its images have labels; give a folder with others")
    return choose(candidates, count, list(known.values()))


def _comparable(points: np.ndarray) -> np.ndarray:
    """The points (N, F) around their mean, of length 1; those at the mean itself stay there."""
    centred = points - points.mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    scaled: np.ndarray = centred / np.maximum(lengths, 1e-9)
    return scaled


def _distances(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Of points (N, F) to a centre (F,), all of length 1 or 0: 0 for the same direction, 1 for opposite ones."""
    apart: np.ndarray = np.linalg.norm(points - centre, axis=1) / 2
    return apart


def _reason(reliability: float, distance: float | None) -> str:
    doubt = f"expected IoU {reliability:.2f}"
    if distance is None:
        return f"{doubt}, the most doubtful"
    if distance >= _UNLIKE:
        return f"{doubt}, unlike all before ({distance:.2f})"
    return f"{doubt}, {'much like one before' if distance < _ALIKE else 'rather unlike those before'} ({distance:.2f})"
