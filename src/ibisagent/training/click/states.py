"""What `ibis-click` is trained on: views of image-mask pairs, and episodes of simulated clicks in them.

Each view is an episode: it starts with a click, a box or both (or a mask to refine), the network's own mask is fed
back, and the next click goes where `clicks.next_click` or a random wrong pixel says (RITM, Sofiiuk et al. 2022).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from skimage.segmentation import felzenszwalb

from ibisagent.domain import Box, Case, Click, Mask, Prompt
from ibisagent.errors import DataError
from ibisagent.imaging.clicks import bounding_box, interior_depth, next_click
from ibisagent.imaging.masks import CORRUPTIONS, corrupt
from ibisagent.segmenters.backbone_sizes import SIDE as VIEW_SIDE
from ibisagent.segmenters.context_features import places_seen
from ibisagent.segmenters.letterbox import prompt_maps
from ibisagent.training.images import FeatureCache

STORED_SIDE = 512  # images are kept in memory at this longer side
TARGET = "object"
PART_PIXELS = 20  # of the network's grid: the least part of an object that is taken back on its own


@dataclass(frozen=True, eq=False)
class Pair:
    """One image and one of its masks, as kept in memory. group: what sampling is balanced over. image: the number
    of its image in the cache."""

    pixels: np.ndarray
    mask: Mask
    group: str
    regions: np.ndarray = field(repr=False)
    image: int = 0


def is_development(patient: str) -> bool:
    """Whether a training patient is held out for choosing settings: one in sixteen, by the hash of its name."""
    return hashlib.sha256(patient.encode()).digest()[0] % 16 == 0


def pairs_from(cases: Iterable[Case], place: Mapping[str, int]) -> list[Pair]:
    """The pairs of `cases`, shrunk to STORED_SIDE, with superpixels of each image for made-up targets.

    place: the number of an image by its content hash.
    """
    pairs: list[Pair] = []
    images: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for case in cases:
        if not case.targets:
            continue
        if case.image.sha256 not in images:
            scale = min(1.0, STORED_SIDE / max(case.image.size))
            pixels = cv2.resize(case.image.pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            coarse = cv2.resize(pixels, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA)
            coarse_regions = felzenszwalb(coarse, scale=100, sigma=0.6, min_size=20).astype(np.int16)
            regions = cv2.resize(coarse_regions, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            images[case.image.sha256] = (pixels, regions)
        pixels, regions = images[case.image.sha256]
        for name, mask in case.targets.items():
            small = cv2.resize(mask.astype(np.uint8), pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
            if not small.any():  # absent, or nothing is left of it
                continue
            pairs.append(
                Pair(pixels, small, f"{case.meta.get('dataset', '')}/{name}", regions, place[case.image.sha256])
            )
    return pairs


@dataclass(eq=False)
class State:
    """An episode in the pool, on the network's grid.

    planes (3, S, S) float32; ground truth and probability (S, S). context: augmentation and number of a view in the
    cache; places: where in that view the cells of the episode's view lie (`places_seen`).
    """

    planes: np.ndarray
    ground_truth: Mask
    prompts: list[Prompt]
    probability: np.ndarray
    clicks_left: int
    context: tuple[int, int]
    places: np.ndarray

    def network_input(self) -> np.ndarray:
        """(CHANNELS, S, S) float32, as `ClickNetwork` wants it."""
        side = self.ground_truth.shape[0]
        maps = prompt_maps(self.prompts, side, scale=1.0)
        return np.concatenate([self.planes, self.probability[None], maps])


def _augment_colours(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(S, S, 3) float32 in [0, 1] with random contrast, gamma, colour cast, inversion, grey, blur and noise."""
    if random.random() < 0.15:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    if random.random() < 0.06:
        pixels = 1 - pixels
    if random.random() < 0.7:
        pixels = np.clip(pixels, 1e-4, 1) ** np.float32(math.exp(random.uniform(-0.5, 0.5)))
        pixels = pixels * np.float32(random.uniform(0.7, 1.3)) + np.float32(random.uniform(-0.12, 0.12))
    if random.random() < 0.3:
        pixels = pixels * random.uniform(0.85, 1.15, size=3).astype(np.float32)
    if random.random() < 0.2:
        pixels = cv2.GaussianBlur(pixels, (0, 0), random.uniform(0.4, 1.5))
    if random.random() < 0.3:
        pixels = pixels + random.normal(0, random.uniform(0.01, 0.06), pixels.shape).astype(np.float32)
    return np.clip(pixels, 0, 1)


def _made_up_target(pair: Pair, random: np.random.Generator) -> Mask:
    """A superpixel, or a few neighbouring ones: an object that no data set names."""
    seed = pair.regions[tuple(random.integers(0, side) for side in pair.regions.shape)]
    mask = pair.regions == seed
    for _ in range(random.integers(0, 3)):
        around = pair.regions[cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool) & ~mask]
        if around.size:
            mask |= pair.regions == random.choice(around)
    return mask


def _view(
    pair: Pair, side: int, random: np.random.Generator, made_up: float, window_share: float
) -> tuple[np.ndarray, Mask, np.ndarray] | None:
    """A random view of a pair on the network's grid, its mask in it, and the affine map that leads there: the whole
    image, or a window on the object as the second pass of `ibis-click` takes it; flipped and turned. None if the
    object is not to be seen in it."""
    mask = _made_up_target(pair, random) if random.random() < made_up else pair.mask
    box = bounding_box(mask, TARGET)
    if box is None:
        return None
    size = np.array([mask.shape[1], mask.shape[0]])
    middle = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2
    if random.random() >= window_share:
        window = max(size) * (1.0 if random.random() < 0.5 else math.exp(random.uniform(-0.35, 0.3)))
        middle = size / 2 + (middle - size / 2) * random.random()
    else:
        extent = max(box.x1 - box.x0, box.y1 - box.y0)
        window = np.clip(extent * math.exp(random.uniform(-0.1, 1.15)), 0.12 * max(size), max(size))
        middle = middle + random.uniform(-0.15, 0.15, size=2) * window
    scale = side / window
    angle = 0.0 if random.random() < 0.4 else random.uniform(-30, 30) + 90 * random.integers(0, 4)
    turn: np.ndarray = cv2.getRotationMatrix2D(tuple(middle), angle, scale)
    turn[:, 2] = turn[:, 2] + side / 2 - middle
    if angle == 0:  # as at inference: the window lies inside the image, or the image in the upper left corner
        turn[:, 2] = np.clip(turn[:, 2], np.minimum(side - scale * size, 0), 0)
    if random.random() < 0.5:
        turn[0] = [-turn[0, 0], -turn[0, 1], side - 1 - turn[0, 2]]
    shrink = scale < 0.8
    pixels = cv2.GaussianBlur(pair.pixels, (0, 0), 0.35 / scale) if shrink else pair.pixels
    view = cv2.warpAffine(pixels, turn, (side, side), flags=cv2.INTER_LINEAR).astype(np.float32) / 255
    ground_truth = cv2.warpAffine(mask.astype(np.uint8), turn, (side, side), flags=cv2.INTER_NEAREST) > 0
    inside = np.count_nonzero(ground_truth)
    if inside < max(6, 0.25 * mask.sum() * scale * scale) or inside > 0.95 * side * side:
        return None
    return _augment_colours(view, random), ground_truth, turn


def _random_pixel(region: Mask, random: np.random.Generator) -> tuple[int, int]:
    """(x, y) of a pixel of `region`, inner ones more often."""
    depth = interior_depth(region).ravel()
    index = int(np.searchsorted(np.cumsum(depth), random.random() * float(depth.sum())))
    y, x = divmod(min(index, depth.size - 1), region.shape[1])
    return x, y


def jittered_box(ground_truth: Mask, random: np.random.Generator, spread: float) -> Box:
    """The box of a mask that is not empty, its sides moved by `spread` of its size (one standard deviation)."""
    box = bounding_box(ground_truth, TARGET)
    assert box is not None
    width, height, side = box.x1 - box.x0, box.y1 - box.y0, ground_truth.shape[0]
    moves = random.normal(0, spread, 4) * [width, height, width, height]
    x0, y0 = int(np.clip(box.x0 + moves[0], 0, side - 2)), int(np.clip(box.y0 + moves[1], 0, side - 2))
    x1, y1 = int(np.clip(box.x1 + moves[2], x0 + 1, side)), int(np.clip(box.y1 + moves[3], y0 + 1, side))
    return Box(x0, y0, x1, y1, TARGET)


def corrupted(ground_truth: Mask, random: np.random.Generator) -> Mask:
    """A corrupted start mask: eroded, dilated, shifted or with a bite taken out."""
    kind = random.choice(CORRUPTIONS, p=[0.25, 0.25, 0.25, 0.125, 0.125])
    radius = int(random.integers(1, max(2, ground_truth.shape[0] // 20)))
    move = random.integers(-2 * radius, 2 * radius + 1, size=2)
    return corrupt(ground_truth, kind, radius, _random_pixel(ground_truth, random), (move[0], move[1]))


def coarsened(probability: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A mask probability as a pass on a larger window leaves it: half of the time blurred by a smaller grid."""
    if random.random() < 0.5:
        return probability
    side = probability.shape[0]
    small = int(random.integers(side // 6, side // 2))
    shrunk = cv2.resize(probability, (small, small), interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (side, side), interpolation=cv2.INTER_LINEAR)


def _parts(ground_truth: Mask) -> list[Mask]:
    """The parts of an object, those of at least PART_PIXELS; empty where it is in one piece."""
    count, labels, facts, _ = cv2.connectedComponentsWithStats(ground_truth.astype(np.uint8))
    parts = [labels == part for part in range(1, count) if facts[part, cv2.CC_STAT_AREA] >= PART_PIXELS]
    return parts if len(parts) > 1 else []


def _take_back(state: State, parts: Sequence[Mask], random: np.random.Generator) -> None:
    """Make a state of a finished one: of all that looks alike some is not meant, and has a negative click each."""
    count = int(random.integers(1, min(3, len(parts) - 1) + 1))
    chosen = random.permutation(len(parts))
    state.probability = state.ground_truth.astype(np.float32)
    if random.random() < 0.5:
        state.prompts.append(Click(*_random_pixel(parts[chosen[-1]], random), True, TARGET))
    for part in (parts[number] for number in chosen[:count]):
        state.ground_truth = state.ground_truth & ~part
        state.prompts.append(Click(*_random_pixel(part, random), False, TARGET))


def correct(state: State, random: np.random.Generator) -> bool:
    """Append the next corrective click to `state`; False when nothing is left to correct."""
    current = state.probability > 0.5
    past = [prompt for prompt in state.prompts if isinstance(prompt, Click)]
    click = next_click(state.ground_truth, current, TARGET, past)
    if click is None:
        return False
    if random.random() < 0.3:
        wrong = state.ground_truth & ~current if click.positive else current & ~state.ground_truth
        x, y = _random_pixel(wrong, random)
        click = Click(x, y, click.positive, TARGET)
    state.prompts.append(click)
    return True


def _context_at(
    pair: Pair, turn: np.ndarray, side: int, feature_cache: FeatureCache, random: np.random.Generator
) -> tuple[int, np.ndarray]:
    """Augmentation of a cached view of the pair's image, and the places in it of a (side, side) view, given by its
    affine map from the image's pixels. A view that lacks much of what is to be seen is left for the plain one."""
    to_image = cv2.invertAffineTransform(turn)
    plain = places_seen(to_image, pair.mask.shape, side)
    shown = (np.abs(plain) < 1).all(axis=-1)
    augmentation = feature_cache.draw(pair.image, random)
    further = feature_cache.turns[augmentation, pair.image].astype(np.float64)
    unit = (plain + 1) / 2 * VIEW_SIDE - 0.5
    places = (np.concatenate([unit, np.ones_like(unit[..., :1])], axis=-1) @ further.T + 0.5) / VIEW_SIDE * 2 - 1
    places[~shown] = plain[~shown]
    lost = shown & ~(np.abs(places) < 1).all(axis=-1)
    if lost.sum() > 0.1 * shown.sum():
        return 0, plain
    return augmentation, places.astype(np.float32)


def new_state(
    pairs: Sequence[Pair],
    weights: np.ndarray,
    feature_cache: FeatureCache,
    side: int,
    random: np.random.Generator,
    made_up: float = 0.15,
    window_share: float = 0.7,
    parts_share: float = 0.25,
) -> State:
    """A fresh episode: a random view of a pair, drawn by `weights`, with its first prompt(s).

    made_up, window_share, parts_share: see `click.ClickRecipe`. DataError where no view shows an object.
    """
    for _ in range(1000):
        pair = pairs[random.choice(len(pairs), p=weights)]
        view = _view(pair, side, random, made_up, window_share)
        if view is not None:
            break
    else:
        raise DataError("1000 views of the training images show no object: are the masks empty, or all of the image?")
    pixels, ground_truth, turn = view
    augmentation, places = _context_at(pair, turn, side, feature_cache, random)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    clicks = int(random.choice([0, 1, 2, 3, 4, 6, 9, 14], p=[0.16, 0.16, 0.16, 0.15, 0.13, 0.12, 0.08, 0.04]))
    state = State(
        planes, ground_truth, [], np.zeros(ground_truth.shape, np.float32), clicks, (augmentation, pair.image), places
    )
    start = random.random()
    parts = _parts(ground_truth) if random.random() < parts_share else []
    if parts and start < 0.5:
        _take_back(state, parts, random)
        return state
    if parts:  # one alone, in its box
        state.ground_truth = ground_truth = parts[random.integers(len(parts))]
        start = random.uniform(0.1, 0.6)
    if start < 0.1:
        state.probability = corrupted(ground_truth, random).astype(np.float32)
        if correct(state, random):
            return state
    if start < 0.6:
        state.prompts.append(jittered_box(ground_truth, random, random.choice([0.0, 0.0, 0.04, 0.1, 0.2])))
    if start < 0.28 or start >= 0.6:
        centred = random.random() < 0.5
        point = next_click(ground_truth, np.zeros_like(ground_truth), TARGET) if centred else None
        x, y = (point.x, point.y) if point else _random_pixel(ground_truth, random)
        state.prompts.append(Click(x, y, True, TARGET))
    return state
