"""The images that the small networks learn from: in memory, squashed to a square, drawn in balance, augmented; and the
context features of their views."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from ibisagent.datasets import CaseRow, CaseSource, read_cases
from ibisagent.domain import Case, Mask
from ibisagent.errors import DataError
from ibisagent.segmenters.backbone_sizes import SIDE
from ibisagent.segmenters.context_features import FEATURES, ContextEncoder, context_input
from ibisagent.segmenters.context_features import GRID as CONTEXT_GRID

# Images of these have no up or down, left or right; of those, no left or right.
TURNABLE = {"microscopy", "pathology", "dermoscopy", "endoscope", "electron microscopy"}
MIRRORED = {"fundus", "OCT", "ultrasound"}
FULL_GROUP = 40  # images of a data set that get every augmented view


def read_training_cases(paths: Sequence[Path], licence_class: str) -> CaseSource:
    """The rows for training of multiple data sets (`read_cases`), of one licence class where it is given."""
    licences = {licence_class} if licence_class else None
    sources = [read_cases(path, split="train", licence_classes=licences) for path in paths]
    return CaseSource([row for source in sources for row in source.rows], ", ".join(map(str, paths)))


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """Squashed images and masks in memory.

    pixels (N, SIDE, SIDE, 3) uint8. rows: one per pair; image: number of its image; `mask` gives its (SIDE, SIDE) bool.
    present: the numbers of the pairs of each image.
    """

    pixels: np.ndarray
    rows: Sequence[CaseRow]
    image: np.ndarray
    packed: np.ndarray
    present: Mapping[int, Sequence[int]]

    @classmethod
    def of(cls, source: CaseSource, *, absent: bool = False) -> TrainingImages:
        """Decode all cases of `source` that can be; those whose squashed mask is empty are left out.

        absent: keep those of objects that are known to be absent, with their empty masks.
        """
        numbers: dict[str, int] = {}
        pixels: list[np.ndarray] = []
        rows: list[CaseRow] = []
        image, packed = [], []
        present: dict[int, list[int]] = defaultdict(list)
        for row, case in source.readable():
            if not case.targets:
                continue
            mask = squash(case.targets[row.object])
            if not mask.any() and not (absent and row.mask is None):
                continue
            number = numbers.setdefault(case.image.sha256, len(numbers))
            if number == len(pixels):
                pixels.append(cv2.resize(case.image.pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
            present[number].append(len(rows))
            rows.append(row)
            image.append(number)
            packed.append(np.packbits(mask))
        if not rows:
            raise DataError(f"{source.where}: no mask is left to learn from")
        return cls(np.stack(pixels), rows, np.array(image), np.stack(packed), dict(present))

    @cached_property
    def sha256(self) -> str:
        """Hash of all that is learned from."""
        found = hashlib.sha256("\n".join(row.id for row in self.rows).encode())
        for part in (self.pixels, self.packed):
            found.update(np.ascontiguousarray(part).data)
        return found.hexdigest()

    def mask(self, pair: int) -> Mask:
        """(SIDE, SIDE) bool."""
        return np.unpackbits(self.packed[pair]).reshape(SIDE, SIDE).astype(bool)


def sha256_of(cases: Iterable[Case]) -> str:
    """Hash of the images and masks of `cases`."""
    found = hashlib.sha256()
    for case in cases:
        found.update(case.image.sha256.encode())
        for name, mask in (case.targets or {}).items():
            found.update(name.encode() + np.packbits(mask).tobytes())
    return found.hexdigest()


def squash(plane: np.ndarray) -> Mask:
    """A mask (H, W) on the SIDE x SIDE grid."""
    return cv2.resize(plane.astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST) > 0


def balanced_weights(rows: Sequence[CaseRow]) -> np.ndarray:
    """How often to draw each row, summing to 1.

    Rows of one patient share the square root of their number, and so do the rows of one object in one data set, and
    those of one modality: a thousand chest radiographs do not drown ten pancreases, nor the tiles of one slide a slide.
    """
    weights = np.ones(len(rows))
    for key in (
        lambda row: (row.dataset, row.object, row.patient),
        lambda row: (row.dataset, row.object),
        lambda row: row.modality,
    ):
        total: dict[Any, float] = defaultdict(float)
        for row, weight in zip(rows, weights, strict=True):
            total[key(row)] += weight
        weights *= [total[key(row)] ** -0.5 for row in rows]
    return weights / weights.sum()


def random_turn(modality: str, random: np.random.Generator) -> np.ndarray:
    """A (2, 3) float32 affine map of a squashed image onto itself: mild, and free where the modality has no side."""
    angle = random.uniform(-15, 15) + (90 * random.integers(0, 4) if modality in TURNABLE else 0)
    scale = math.exp(random.uniform(-0.25, 0.35))
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), angle, scale)
    stretch = math.exp(random.uniform(-0.12, 0.12))
    turn[0] *= stretch
    turn[0, 2] += SIDE / 2 * (1 - stretch)
    turn[:, 2] = turn[:, 2] + random.uniform(-0.1, 0.1, size=2) * SIDE
    if modality in TURNABLE | MIRRORED and random.random() < 0.5:
        turn[0] = [-turn[0, 0], -turn[0, 1], SIDE - 1 - turn[0, 2]]
    return turn.astype(np.float32)


def closer(turn: np.ndarray, mask: Mask, random: np.random.Generator) -> np.ndarray:
    """`turn` followed by an enlargement around the object `mask` (SIDE, SIDE), which stays wholly visible."""
    rows, columns = np.nonzero(cv2.warpAffine(mask.astype(np.uint8), turn, (SIDE, SIDE), flags=cv2.INTER_NEAREST))
    if not rows.size:
        return turn
    x0, x1, y0, y1 = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    largest = 0.8 * SIDE / max(x1 - x0, y1 - y0, 1)
    if largest <= 1.2:
        return turn
    scale = math.exp(random.uniform(math.log(1.2), math.log(min(largest, 3.0))))
    side = SIDE / scale
    left = random.uniform(max(x1 - side, 0), min(x0, SIDE - side))  # in order: the object is smaller than `side`
    top = random.uniform(max(y1 - side, 0), min(y0, SIDE - side))
    zoom = np.array([[scale, 0, -left * scale], [0, scale, -top * scale], [0, 0, 1]])
    return (zoom @ np.vstack([turn, [0, 0, 1]]))[:2].astype(np.float32)


def recolored(view: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 with random gamma, contrast, brightness, colour cast, blur and noise."""
    table = (np.arange(256) + 1) / 256
    table = table ** math.exp(random.uniform(-0.45, 0.45))
    table = table * random.uniform(0.75, 1.25) + random.uniform(-0.08, 0.08)
    tables = np.repeat(table[:, None], 3, axis=1)
    if random.random() < 0.4:
        tables = tables * random.uniform(0.85, 1.15, size=3)
    view = cv2.LUT(view, (np.clip(tables, 0, 1) * 255).astype(np.uint8)[None])
    if random.random() < 0.15:
        view = cv2.GaussianBlur(view, (0, 0), random.uniform(0.5, 1.4))
    if random.random() < 0.2:
        noise = random.normal(0, random.uniform(2, 10), view.shape[:2]).astype(np.float32)
        view = np.clip(view + noise[..., None], 0, 255).astype(np.uint8)
    return view


@dataclass(frozen=True, eq=False)
class FeatureCache:
    """Context features (`segmenters.context_features`) of V views of N squashed images; number 0 is the plain image.

    The encoder is never trained, so each view is embedded once, into memory-mapped arrays, before training: what makes
    training of the small networks possible on a CPU. features (V, N, FEATURES, GRID, GRID) float16, 0.4 MB each;
    turns (V, N, 2, 3) float32, the affine maps from squashed pixels to view pixels; done (V, N) uint8, 1 where a view
    is complete. place: the number of an image by its content hash.
    """

    features: np.memmap
    turns: np.memmap
    done: np.memmap
    place: Mapping[str, int]

    @classmethod
    def of(cls, cases: Iterable[Case], folder: Path, augmentations_per_image: int, seed: int) -> FeatureCache:
        """The cache of the images of `cases` under `folder`; missing views are embedded first (0.1 s a view and core).

        Augmented views leave out part of a data set of more than FULL_GROUP images, which has variety of its own.
        """
        images = list({case.image.sha256: case for case in cases}.values())
        cache = cls._open(folder, [case.image.sha256 for case in images], augmentations_per_image, seed)
        sizes = Counter(case.meta.get("dataset") for case in images)
        for augmentation, number in np.argwhere(cache.done == 0):
            random, case = np.random.default_rng([seed, augmentation, number]), images[number]
            if augmentation and random.random() >= FULL_GROUP / sizes[case.meta.get("dataset")]:
                continue
            view = cv2.resize(case.image.pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            turn = np.eye(2, 3, dtype=np.float32)
            if augmentation:
                turn = random_turn(case.meta.get("modality", ""), random)
                view = recolored(cv2.warpAffine(view, turn, (SIDE, SIDE), flags=cv2.INTER_LINEAR), random)
            cache._embed(view, turn, augmentation, number)
        return cache

    @classmethod
    def _open(cls, folder: Path, hashes: Sequence[str], views: int, seed: int) -> FeatureCache:
        content = hashlib.sha256(" ".join([str(views), str(seed), *hashes]).encode()).hexdigest()[:16]
        folder = folder / f"context-{content}"
        folder.mkdir(parents=True, exist_ok=True)

        def array(name: str, dtype: type, *shape: int) -> np.memmap:
            path = folder / name
            mode: Literal["r+", "w+"] = "r+" if path.exists() else "w+"
            return np.memmap(path, dtype=dtype, mode=mode, shape=(views, len(hashes), *shape))

        features = array("features.f16", np.float16, FEATURES, CONTEXT_GRID, CONTEXT_GRID)
        place = {content: number for number, content in enumerate(hashes)}
        return cls(features, array("turns.f32", np.float32, 2, 3), array("done.u8", np.uint8), place)

    @cached_property
    def _encoder(self) -> ContextEncoder:
        return ContextEncoder()

    def _embed(self, view: np.ndarray, turn: np.ndarray, augmentation: int, number: int) -> None:
        self.features[augmentation, number] = self._encoder.embed(context_input(view)[None])[0]
        self.turns[augmentation, number] = turn
        self.done[augmentation, number] = 1

    def draw(self, image: int, random: np.random.Generator) -> int:
        """The augmentation of a random view of an image, given by its number."""
        return int(random.choice(np.flatnonzero(self.done[:, image])))


def context_features(images: TrainingImages, folder: Path) -> np.ndarray:
    """The context features of the plain images, (N, FEATURES, GRID, GRID) float16; see `FeatureCache`."""
    cache = FeatureCache._open(folder, [hashlib.sha256(one).hexdigest() for one in images.pixels], 1, 0)
    for number in np.flatnonzero(cache.done[0] == 0):
        cache._embed(images.pixels[number], np.eye(2, 3, dtype=np.float32), 0, int(number))
    return cache.features[0]
