"""Trains `ibis-click`: iterative click simulation on image-mask pairs (RITM, Sofiiuk et al. 2022).

    python -m ibisagent.training.click DATA -o OUT --minutes 120

Each picture is an episode in a pool: it starts with a click, a box or both (or a mask to refine), the network's own
mask is fed back, and the next click goes where `clicks.next_click` or a random wrong pixel says. The training pass is
also the step of the episode, so simulation costs nothing extra. Resolution grows during the run, from coarse and fast
to full.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage.segmentation import felzenszwalb
from torch.nn import functional as F

from ibisagent.clicks import bounding_box, interior_depth, next_click
from ibisagent.domain import Box, Case, Click, Mask, Prompt
from ibisagent.masks import iou
from ibisagent.segmenters.click_network import ClickNetwork, ClickNetworkConfig
from ibisagent.segmenters.frame import prompt_maps

STORED_SIDE = 384  # pictures are kept in memory at this longer side
TARGET = "object"


@dataclass(frozen=True, eq=False)
class Pair:
    """One picture and one of its masks, as kept in memory. group: what sampling is balanced over."""

    pixels: np.ndarray
    mask: Mask
    group: str
    regions: np.ndarray = field(repr=False)


def is_development(patient: str) -> bool:
    """Whether a training patient is held out for choosing settings: one in sixteen, by the hash of its name."""
    return hashlib.sha256(patient.encode()).digest()[0] % 16 == 0


def pairs_from(cases: Iterable[Case]) -> list[Pair]:
    """The pairs of `cases`, shrunk to STORED_SIDE, with superpixels of each picture for made-up targets."""
    pairs: list[Pair] = []
    cached: tuple[str, np.ndarray, np.ndarray] = ("", np.empty(0), np.empty(0))
    for case in cases:
        if case.image.sha256 != cached[0]:
            scale = min(1.0, STORED_SIDE / max(case.image.size))
            pixels = cv2.resize(case.image.pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            coarse = cv2.resize(pixels, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA)
            coarse_regions = felzenszwalb(coarse, scale=100, sigma=0.6, min_size=20).astype(np.int16)
            shape = (pixels.shape[1], pixels.shape[0])
            regions = cv2.resize(coarse_regions, shape, interpolation=cv2.INTER_NEAREST)
            cached = (case.image.sha256, pixels, regions)
        _, pixels, regions = cached
        for name, mask in (case.targets or {}).items():
            shape = (pixels.shape[1], pixels.shape[0])
            small = cv2.resize(mask.astype(np.uint8), shape, interpolation=cv2.INTER_NEAREST) > 0
            pairs.append(Pair(pixels, small, f"{case.meta.get('dataset', '')}/{name}", regions))
    return pairs


@dataclass(eq=False)
class State:
    """An episode in the pool, on the network's grid. planes (3, S, S) float32; truth and probability (S, S)."""

    planes: np.ndarray
    truth: Mask
    prompts: list[Prompt]
    probability: np.ndarray
    clicks_left: int

    def network_input(self) -> np.ndarray:
        """(CHANNELS, S, S) float32, as `ClickNetwork` wants it."""
        side = self.truth.shape[0]
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


def _view(pair: Pair, side: int, random: np.random.Generator) -> tuple[np.ndarray, Mask] | None:
    """A random view of a pair on the network's grid: the whole picture, or a window on the object as the second look
    of `ibis-click` takes it; flipped and turned. None if the object is not to be seen in it."""
    mask = _made_up_target(pair, random) if random.random() < 0.15 else pair.mask
    box = bounding_box(mask, TARGET)
    if box is None:
        return None
    size = np.array([mask.shape[1], mask.shape[0]])
    middle = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2
    if random.random() < 0.3:
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
    if angle == 0:  # as at inference: the window lies inside the picture, or the picture in the upper left corner
        turn[:, 2] = np.clip(turn[:, 2], np.minimum(side - scale * size, 0), 0)
    if random.random() < 0.5:
        turn[0] = [-turn[0, 0], -turn[0, 1], side - 1 - turn[0, 2]]
    shrink = scale < 0.8
    pixels = cv2.GaussianBlur(pair.pixels, (0, 0), 0.35 / scale) if shrink else pair.pixels
    view = cv2.warpAffine(pixels, turn, (side, side), flags=cv2.INTER_LINEAR).astype(np.float32) / 255
    truth = cv2.warpAffine(mask.astype(np.uint8), turn, (side, side), flags=cv2.INTER_NEAREST) > 0
    inside = np.count_nonzero(truth)
    if inside < max(6, 0.25 * mask.sum() * scale * scale) or inside > 0.95 * side * side:
        return None
    return _augment_colours(view, random), truth


def _random_pixel(region: Mask, random: np.random.Generator) -> tuple[int, int]:
    """(x, y) of a pixel of `region`, inner ones more often."""
    depth = interior_depth(region).ravel()
    index = int(np.searchsorted(np.cumsum(depth), random.random() * float(depth.sum())))
    y, x = divmod(min(index, depth.size - 1), region.shape[1])
    return x, y


def _jittered_box(truth: Mask, random: np.random.Generator) -> Box:
    box = bounding_box(truth, TARGET)
    assert box is not None  # views are never empty
    spread = random.choice([0.0, 0.05, 0.12, 0.2])
    width, height, side = box.x1 - box.x0, box.y1 - box.y0, truth.shape[0]
    moves = random.normal(0, spread, 4) * [width, height, width, height]
    x0, y0 = int(np.clip(box.x0 + moves[0], 0, side - 2)), int(np.clip(box.y0 + moves[1], 0, side - 2))
    x1, y1 = int(np.clip(box.x1 + moves[2], x0 + 1, side)), int(np.clip(box.y1 + moves[3], y0 + 1, side))
    return Box(x0, y0, x1, y1, TARGET)


def spoilt(truth: Mask, random: np.random.Generator) -> Mask:
    """An imperfect start mask: eroded, dilated, shifted or with a bite taken out."""
    kind, side = random.integers(4), truth.shape[0]
    radius = int(random.integers(1, max(2, side // 20)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    if kind == 0:
        return cv2.erode(truth.astype(np.uint8), kernel) > 0
    if kind == 1:
        return cv2.dilate(truth.astype(np.uint8), kernel) > 0
    if kind == 2:
        return np.roll(truth, random.integers(-2 * radius, 2 * radius + 1, size=2), axis=(0, 1))
    x, y = _random_pixel(truth, random)
    bite = np.zeros_like(truth, dtype=np.uint8)
    cv2.circle(bite, (x, y), 2 * radius, 1, cv2.FILLED)
    return truth & (bite == 0) if random.random() < 0.5 else truth | (bite > 0)


def coarsened(probability: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A mask probability as a look from farther away leaves it: half of the time blurred by a smaller grid."""
    if random.random() < 0.5:
        return probability
    side = probability.shape[0]
    small = int(random.integers(side // 6, side // 2))
    shrunk = cv2.resize(probability, (small, small), interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (side, side), interpolation=cv2.INTER_LINEAR)


def correct(state: State, random: np.random.Generator) -> bool:
    """Append the next corrective click to `state`; False when nothing is left to correct."""
    current = state.probability > 0.5
    past = [prompt for prompt in state.prompts if isinstance(prompt, Click)]
    click = next_click(state.truth, current, TARGET, past)
    if click is None:
        return False
    if random.random() < 0.3:
        wrong = state.truth & ~current if click.positive else current & ~state.truth
        x, y = _random_pixel(wrong, random)
        click = Click(x, y, click.positive, TARGET)
    state.prompts.append(click)
    return True


def new_state(pairs: Sequence[Pair], weights: np.ndarray, side: int, random: np.random.Generator) -> State:
    """A fresh episode: a random view of a pair with its first prompt(s)."""
    while True:
        view = _view(pairs[random.choice(len(pairs), p=weights)], side, random)
        if view is not None:
            break
    pixels, truth = view
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    clicks = int(random.choice([0, 1, 2, 3, 4, 6, 9, 14], p=[0.16, 0.16, 0.16, 0.15, 0.13, 0.12, 0.08, 0.04]))
    state = State(planes, truth, [], np.zeros(truth.shape, np.float32), clicks)
    start = random.random()
    if start < 0.1:
        state.probability = spoilt(truth, random).astype(np.float32)
        if correct(state, random):
            return state
    if start < 0.4:
        state.prompts.append(_jittered_box(truth, random))
    if start < 0.25 or start >= 0.4:
        centred = random.random() < 0.5
        point = next_click(truth, np.zeros_like(truth), TARGET) if centred else None
        x, y = (point.x, point.y) if point else _random_pixel(truth, random)
        state.prompts.append(Click(x, y, True, TARGET))
    return state


def mask_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Focal-weighted cross-entropy plus soft Dice; both (B, 1, S, S)."""
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    focus = (probability - truth).abs().detach() + 0.1
    focal = (entropy * focus).sum(dim=(1, 2, 3)) / focus.sum(dim=(1, 2, 3))
    overlap = (probability * truth).sum(dim=(1, 2, 3))
    total = probability.sum(dim=(1, 2, 3)) + truth.sum(dim=(1, 2, 3))
    soft_dice = 1 - (2 * overlap + 1) / (total + 1)
    return (focal + soft_dice).mean()


@torch.no_grad()
def clicks_iou(network: ClickNetwork, pairs: Sequence[Pair], side: int, clicks: int) -> list[float]:
    """Mean IoU on the network's grid after 1..clicks simulated clicks: a quick look during training."""
    scores = np.zeros(clicks)
    for pair in pairs:
        scale = side / max(pair.mask.shape)
        shape = (round(pair.mask.shape[1] * scale), round(pair.mask.shape[0] * scale))
        pixels = np.zeros((side, side, 3), np.float32)
        pixels[: shape[1], : shape[0]] = cv2.resize(pair.pixels, shape, interpolation=cv2.INTER_AREA) / 255
        truth = np.zeros((side, side), bool)
        truth[: shape[1], : shape[0]] = cv2.resize(pair.mask.astype(np.uint8), shape, interpolation=cv2.INTER_NEAREST)
        state = State(pixels.transpose(2, 0, 1), truth, [], np.zeros((side, side), np.float32), clicks)
        best = 0.0
        for index in range(clicks):
            click = next_click(
                truth, state.probability > 0.5, TARGET, [p for p in state.prompts if isinstance(p, Click)]
            )
            if click is not None:
                state.prompts.append(click)
                batch = torch.from_numpy(state.network_input()[None])
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits, _ = network(batch)
                state.probability = logits.float().sigmoid()[0, 0].numpy()
                best = iou(state.probability > 0.5, truth)
            scores[index] += best
    return [round(float(score) / len(pairs), 4) for score in scores]


def train(
    pairs: Sequence[Pair],
    development: Sequence[Pair],
    out: Path,
    *,
    states: int,
    seed: int,
    side: int = 192,
    batch: int = 16,
    rate: float = 1e-3,
    start: ClickNetwork | None = None,
) -> None:
    """Train for `states` states (resuming from OUT/checkpoint.pt) and write OUT/ibis-click.safetensors."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network = (start or ClickNetwork(ClickNetworkConfig(side=side))).to(memory_format=torch.channels_last)
    average = ClickNetwork(network.config)
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    counts = Counter(pair.group for pair in pairs)
    weights = np.array([counts[pair.group] ** -0.6 for pair in pairs])
    weights /= weights.sum()
    step = 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        random = np.random.default_rng([seed, step])
    pool = [new_state(pairs, weights, side, random) for _ in range(3 * batch)]
    last_save, last_look, running = time.monotonic(), time.monotonic(), 0.0
    while (progress := step * batch / states) < 1:
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        chosen = random.choice(len(pool), batch, replace=False)
        inputs = torch.from_numpy(np.stack([pool[i].network_input() for i in chosen]))
        truth = torch.from_numpy(np.stack([pool[i].truth for i in chosen])[:, None].astype(np.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, quality = network(inputs.contiguous(memory_format=torch.channels_last))
        logits, quality = logits.float(), quality.float()
        inside = logits.detach() > 0
        reached = (inside & (truth > 0)).sum((1, 2, 3)) / (inside | (truth > 0)).sum((1, 2, 3)).clamp(min=1)
        loss = mask_loss(logits, truth) + 0.2 * F.binary_cross_entropy_with_logits(quality, reached)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, step / (step + 10))
        with torch.no_grad():
            for kept, fresh in zip(average.parameters(), network.parameters(), strict=True):
                kept.lerp_(fresh, 1 - decay)
        running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
        probabilities = logits.detach().sigmoid()[:, 0].numpy()
        for index, probability in zip(chosen, probabilities, strict=True):
            state = pool[index]
            state.probability = probability
            state.clicks_left -= 1
            if state.clicks_left < 0:
                pool[index] = new_state(pairs, weights, side, random)
            elif random.random() < 0.15:
                state.probability = coarsened(probability, random)
            elif not correct(state, random):
                pool[index] = new_state(pairs, weights, side, random)
        now = time.monotonic()
        if now - last_look > 300:
            last_look = now
            average.eval()
            look = clicks_iou(average, development[:60], side, 5)
            print(f"{step * batch} states, loss {running:.3f}, IoU@1-5 {look}", flush=True)
        if now - last_save > 240:
            last_save = now
            state_dicts = {"network": network.state_dict(), "average": average.state_dict()}
            saved = {**state_dicts, "optimizer": optimizer.state_dict(), "step": step}
            torch.save(saved, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    save_weights(average, out, {"states": states, "steps": step, "seed": seed, "pairs": len(pairs)})


def save_weights(network: ClickNetwork, out: Path, recipe: dict[str, object]) -> None:
    """Write ibis-click.safetensors (float16) and ibis-click.json (config and recipe) to `out`."""
    from safetensors.torch import save_file

    tensors = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    temporary = out / "ibis-click.safetensors.tmp"
    save_file(tensors, temporary)
    os.replace(temporary, out / "ibis-click.safetensors")
    description = {"network": network.config.to_dict(), "trained": recipe}
    (out / "ibis-click.json").write_text(json.dumps(description, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    from ibisagent.datasets import read_cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="BiomedParse-style folder or manifest")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--states", type=int, default=200_000)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--start", type=Path, help="weights to start from")
    parser.add_argument("--without", default="", help="data sets to leave out, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--licence-class", default="ok", help="use only rows of this licence class; '' for all")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in read_cases(options.data, split="train") if _licensed(case, options.licence_class)]
    cases = [case for case in cases if case.meta.get("dataset") not in options.without.split(",")]
    pairs = pairs_from(case for case in cases if not is_development(case.patient))
    development = pairs_from(case for case in cases if is_development(case.patient))
    start = None
    if options.start:
        from ibisagent.segmenters.ibis_click import _build, _read

        content, config = _read(options.start)
        start = _build(options.start, content, config)
    train(pairs, development, options.out, states=options.states, seed=options.seed, side=options.side, start=start)


def _licensed(case: Case, licence_class: str) -> bool:
    return not licence_class or case.meta.get("licence_class") == licence_class


if __name__ == "__main__":
    main()
