"""A bank of augmented views of the training images with their context features (`segmenters.context_features`).

The encoder is never trained, so every view of every image is embedded once, before training, into
memory-mapped arrays: what makes training `ibis-click` and `ibis-nano` possible on a CPU. Building is resumable.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np

from ibisagent.domain import Case
from ibisagent.segmenters.context_features import FEATURES, GRID, ContextEncoder, context_input

SIDE = 256  # pixels of the squashed views
FULL_GROUP = 40  # images of a data set that get every augmented view

# Images of these have no up or down, left or right.
TURNABLE = {"microscopy", "pathology", "dermoscopy", "endoscope"}
MIRRORED = {"fundus", "OCT"}  # right and left eye


@dataclass(frozen=True, eq=False)
class FeatureCache:
    """Memory-mapped arrays over V augmentations of N images; number 0 is the plain image.

    features (V, N, FEATURES, GRID, GRID) float16; pixels (V, N, SIDE, SIDE, 3) uint8; turns (V, N, 2, 3) float32, the
    affine maps from squashed pixels to view pixels; done (V, N) uint8, 1 where a view is complete. place: the number of
    an image by its content hash.
    """

    features: np.memmap
    pixels: np.memmap
    turns: np.memmap
    done: np.memmap
    place: Mapping[str, int]

    @classmethod
    def of(cls, cases: Iterable[Case], folder: Path, augmentations_per_image: int, seed: int) -> FeatureCache:
        """The cache of the images of `cases` under `folder`; missing views are embedded first (0.1 s a view and core).

        Number 0 is untouched, later ones are augmented; they leave out part of a data set of more than FULL_GROUP
        images, which has variety of its own.
        """
        images = list({case.image.sha256: case for case in cases}.values())
        hashes = [case.image.sha256 for case in images]
        content = sha256(" ".join([str(augmentations_per_image), str(seed), *hashes]).encode()).hexdigest()[:16]
        feature_cache = cls._open(folder / f"views-{content}", augmentations_per_image, hashes)
        feature_cache._build(images, seed)
        return feature_cache

    @classmethod
    def _open(cls, folder: Path, augmentations_per_image: int, hashes: Sequence[str]) -> FeatureCache:
        folder.mkdir(parents=True, exist_ok=True)

        def array(name: str, dtype: type, *shape: int) -> np.memmap:
            path, full = folder / name, (augmentations_per_image, len(hashes), *shape)
            return np.memmap(path, dtype=dtype, mode="r+" if path.exists() else "w+", shape=full)

        return cls(
            features=array("features.f16", np.float16, FEATURES, GRID, GRID),
            pixels=array("pixels.u8", np.uint8, SIDE, SIDE, 3),
            turns=array("turns.f32", np.float32, 2, 3),
            done=array("done.u8", np.uint8),
            place={hash_: number for number, hash_ in enumerate(hashes)},
        )

    def _build(self, images: Sequence[Case], seed: int) -> None:
        encoder = ContextEncoder()
        sizes = Counter(case.meta.get("dataset") for case in images)
        for augmentation, number in np.ndindex(self.done.shape):
            random, case = np.random.default_rng([seed, augmentation, number]), images[number]
            wanted = augmentation == 0 or random.random() < FULL_GROUP / sizes[case.meta.get("dataset")]
            if self.done[augmentation, number] or not wanted:
                continue
            view = cv2.resize(case.image.pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            turn = np.eye(2, 3, dtype=np.float32)
            if augmentation:
                turn = random_turn(case.meta.get("modality", ""), random)
                view = _recoloured(cv2.warpAffine(view, turn, (SIDE, SIDE), flags=cv2.INTER_LINEAR), random)
            self.features[augmentation, number] = encoder.embed(context_input(view)[None])[0]
            self.pixels[augmentation, number] = view
            self.turns[augmentation, number] = turn
            self.done[augmentation, number] = 1
            if number % 200 == 199:
                print(f"view {augmentation} of image {number + 1} of {len(images)} embedded", flush=True)

    def draw(self, image: int, random: np.random.Generator) -> int:
        """The augmentation of a random view of an image, given by its number."""
        return int(random.choice(np.flatnonzero(self.done[:, image])))


def random_turn(modality: str, random: np.random.Generator) -> np.ndarray:
    """A (2, 3) float32 affine map of a squashed image onto itself: mild, and free where the modality has no side."""
    angle = random.uniform(-12, 12) + (90 * random.integers(0, 4) if modality in TURNABLE else 0)
    scale = math.exp(random.uniform(-0.18, 0.3))
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), angle, scale)
    turn[:, 2] = turn[:, 2] + random.uniform(-0.09, 0.09, size=2) * SIDE
    if modality in TURNABLE | MIRRORED and random.random() < 0.5:
        turn[0] = [-turn[0, 0], -turn[0, 1], SIDE - 1 - turn[0, 2]]
    return turn.astype(np.float32)


def _recoloured(view: np.ndarray, random: np.random.Generator) -> np.ndarray:
    pixels = (view.astype(np.float32) + 1) / 256
    pixels = pixels ** math.exp(random.uniform(-0.35, 0.35)) * random.uniform(0.85, 1.15)
    if random.random() < 0.4:
        pixels = pixels * random.uniform(0.9, 1.1, size=3)
    return (np.clip(pixels, 0, 1) * 255).astype(np.uint8)
