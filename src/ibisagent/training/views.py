"""A bank of augmented views with frozen features: what makes training the nano policy possible on a CPU.

LiteMedSAM's encoder costs 0.2 to 1 s a picture and is never trained, so every view of every training picture is
embedded once, before training, into memory-mapped arrays. Building is resumable.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ibisagent.policies.nano import FEATURES, GRID, SIDE, pool

FULL_GROUP = 40  # pictures of a data set that get every augmented view

# Pictures of these have no up or down, left or right.
TURNABLE = {"microscopy", "pathology", "dermoscopy", "endoscope"}
MIRRORED = {"fundus", "OCT"}  # right and left eye


@dataclass(frozen=True, eq=False)
class Bank:
    """Memory-mapped arrays over V rounds of N pictures; round 0 is the plain picture.

    features (V, N, GRID, GRID, FEATURES) float16; pixels (V, N, SIDE, SIDE, 3) uint8; turns (V, N, 2, 3) float32, the
    affine maps from squashed pixels to view pixels; done (V, N) uint8, 1 where a view is complete.
    """

    features: np.memmap
    pixels: np.memmap
    turns: np.memmap
    done: np.memmap

    @classmethod
    def open(cls, folder: Path, rounds: int, pictures: int) -> Bank:
        """The bank in `folder`, made with space for `rounds` views of `pictures` pictures if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)

        def array(name: str, dtype: type, *shape: int) -> np.memmap:
            path, full = folder / name, (rounds, pictures, *shape)
            return np.memmap(path, dtype=dtype, mode="r+" if path.exists() else "w+", shape=full)

        features = array("features.f16", np.float16, GRID, GRID, FEATURES)
        pixels = array("pixels.u8", np.uint8, SIDE, SIDE, 3)
        return cls(features, pixels, array("turns.f32", np.float32, 2, 3), array("done.u8", np.uint8))

    def build(
        self, pictures: Sequence[np.ndarray], modalities: Sequence[str], groups: Sequence[str], seed: int
    ) -> None:
        """Embed every missing view of `pictures` (each (H, W, 3) uint8), round 0 untouched, later ones augmented.

        Later rounds leave out part of a group (data set) of more than FULL_GROUP pictures: it has variety of its own.
        """
        from ibisagent.segmenters.litemedsam import LiteMedSamEncoder

        encoder = LiteMedSamEncoder(exact=False)
        sizes = Counter(groups)
        for round_, picture in np.ndindex(self.done.shape):
            random = np.random.default_rng([seed, round_, picture])
            wanted = round_ == 0 or random.random() < FULL_GROUP / sizes[groups[picture]]
            if self.done[round_, picture] or not wanted:
                continue
            view = cv2.resize(pictures[picture], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            turn = np.eye(2, 3, dtype=np.float32)
            if round_:
                turn = random_turn(modalities[picture], random)
                view = _recoloured(cv2.warpAffine(view, turn, (SIDE, SIDE), flags=cv2.INTER_LINEAR), random)
            embedding = encoder.embed((view.astype(np.float32) / 255).transpose(2, 0, 1)[None])[0]
            self.features[round_, picture] = pool(embedding).transpose(1, 2, 0)
            self.pixels[round_, picture] = view
            self.turns[round_, picture] = turn
            self.done[round_, picture] = 1
            if picture % 100 == 99:
                print(f"view {round_} of picture {picture + 1} of {len(pictures)} embedded", flush=True)


def random_turn(modality: str, random: np.random.Generator) -> np.ndarray:
    """A (2, 3) float32 affine map of a squashed picture onto itself: mild, and free where the modality has no side."""
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
