"""Trains `ibis-click`: `ibisagent train click recipes/ibis-click.toml`.

The training pass is also the step of the simulated episode (see `states`), so simulation costs nothing extra.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch.nn import functional as F

from ibisagent.config import NetworkRecipe, Paths
from ibisagent.domain import Click, Image
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import appearing_whole, try_folder, write_json
from ibisagent.imaging.clicks import bounding_box, next_click
from ibisagent.imaging.masks import iou
from ibisagent.segmenters.click_network import ClickNetwork
from ibisagent.segmenters.context_features import ContextEncoder, ContextFeatures
from ibisagent.segmenters.ibis_click import ClickModel, IbisClickSession, read_click_network
from ibisagent.segmenters.letterbox import ClickNetworkConfig
from ibisagent.segmenters.runtime import TorchNetwork, choose_device
from ibisagent.training.click.states import (
    TARGET,
    Pair,
    State,
    coarsened,
    correct,
    is_development,
    new_state,
    pairs_from,
)
from ibisagent.training.images import FeatureCache, read_training_cases, sha256_of
from ibisagent.training.loop import Report, TrainingRun, ignore_progress, warn_without_metrics

FEATURE_DROPOUT = 0.1  # of the context features' channels in each example, against learning images by heart
REPEATED_PASSES = 0.15  # of the steps of an episode bring no click, only the mask of the pass before


class ClickRecipe(NetworkRecipe):
    """How to train a click network."""

    data: Paths
    """Folder or folders in BiomedParse's layout, or manifests; images are kept in memory (at most 1 MB each)."""
    out: Path
    """Folder for checkpoint, weights and logs; a run that was stopped resumes from there."""
    licence_class: str = ""
    """Use only rows of this licence class; empty for all."""
    leave_out: tuple[str, ...] = ()
    """Data sets that are not trained on."""
    start: Path | None = None
    """Weights to start from, such as the packaged ones; none starts from scratch."""
    side: int = Field(192, ge=32, multiple_of=32)
    """Pixels a side of what the network sees."""
    widths: tuple[int, ...] = ClickNetworkConfig.widths
    depth: tuple[int, ...] = ClickNetworkConfig.depth
    states: int = Field(200_000, ge=1)
    """Simulated clicks to learn from: the length of the run."""
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.02
    warmup_steps: PositiveInt = 200
    eval_every: PositiveInt = 8_000
    average_decay: float = Field(0.999, ge=0, lt=1)
    made_up: float = Field(0.15, ge=0, le=1)
    """Share of targets that are superpixels instead of labelled objects."""
    window: float = Field(0.7, ge=0, le=1)
    """Share of views that are windows on the object instead of whole images."""
    parts: float = Field(0.25, ge=0, le=1)
    """Share of the views of an object in multiple parts that teach to take parts back, or one part alone."""
    feature_cache: Path | None = None
    """Folder for the context features of the training images (0.4 MB a view), to share it between runs; none means
    `out`."""
    augmentations_per_image: int = Field(5, ge=1)
    """Views of each image whose context features are computed: the plain one and augmented ones."""
    seed: int = 0
    device: str = "auto"
    tensorboard: bool = True


def train(recipe: ClickRecipe, report: Report = ignore_progress) -> Path:
    """Train as `recipe` says, resuming from its checkpoint if there is one; returns the weights file.

    A run that was interrupted sees other random views than one that was not: its weights differ slightly.
    Raises ConfigError for a checkpoint of another recipe, DataError where there is nothing to train on.
    """
    try_folder(recipe.out)
    source = read_training_cases(recipe.data, recipe.licence_class)
    cases = [case for _, case in source.readable() if case.meta.get("dataset") not in recipe.leave_out]
    if all(is_development(case.patient) for case in cases):
        raise DataError(
            f"{source.where}: no pair is left to train on after licence_class, leave_out and held-out patients"
        )
    feature_cache = FeatureCache.of(
        cases, recipe.feature_cache or recipe.out, recipe.augmentations_per_image, recipe.seed
    )
    pairs = pairs_from((case for case in cases if not is_development(case.patient)), feature_cache.place)
    held_out = pairs_from((case for case in cases if is_development(case.patient)), feature_cache.place)
    if not pairs:
        raise DataError(f"{source.where}: no mask is left to learn from; give rows for training that show their object")
    warn_without_metrics(recipe.out, held_out)
    return _Run(recipe, pairs, held_out, feature_cache, sha256_of(cases)).go(report)


class _Run(TrainingRun):
    """One training run, with a pool of episodes three batches deep."""

    recipe: ClickRecipe
    network: ClickNetwork
    average: ClickNetwork
    free = frozenset({"data", "out", "feature_cache", "start", "device"})

    def __init__(
        self,
        recipe: ClickRecipe,
        pairs: Sequence[Pair],
        held_out: Sequence[Pair],
        feature_cache: FeatureCache,
        learned_from: str,
    ) -> None:
        self.recipe, self.pairs, self.held_out, self.feature_cache = recipe, pairs, held_out, feature_cache
        self.learned_from = learned_from
        self.device = torch.device(choose_device(recipe.device))
        torch.manual_seed(recipe.seed)
        shape = ClickNetworkConfig(side=recipe.side, widths=recipe.widths, depth=recipe.depth)
        first = ClickNetwork(shape) if recipe.start is None else read_click_network(recipe.start)
        if (first.config.widths, first.config.depth) != (shape.widths, shape.depth):
            raise ConfigError(
                f"{recipe.start}: has widths {first.config.widths}, the recipe {shape.widths}: make them agree"
            )
        self.network = ClickNetwork(shape)
        self.network.load_state_dict(first.state_dict())
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = ClickNetwork(shape)
        self.average.load_state_dict(first.state_dict())
        self.average.to(self.device).eval()
        self.contexts = ContextFeatures(ContextEncoder(device=str(self.device)))
        self.weights = sampling_weights(pairs)
        self.goal, self.average_decay = recipe.states, recipe.average_decay
        self.start(self.network.parameters())
        self.random = np.random.default_rng([recipe.seed, self.step])
        self.pool = [self._new_state() for _ in range(3 * recipe.batch_size)]

    def go(self, report: Report) -> Path:
        """Train to the end and write the weights."""
        recipe, running = self.recipe, 0.0
        writer = self._writer()
        while self.examples < self.goal:
            loss = self._learn()
            running = 0.98 * running + 0.02 * loss if running else loss
            states = self.examples
            metrics = self._validate(min(60, len(self.held_out))) if self.due else None
            if metrics is not None:
                self.save_checkpoint()
            if writer is not None and (self.due or self.step % 20 == 0):
                for name, metric in {"loss": running, **(metrics or {})}.items():
                    writer.add_scalar(name, metric, states)
            report(states, {"loss": running}, metrics)
        self.save_checkpoint()
        return save_weights(self.average, recipe.out, self.described(), self._quality_fit())

    def _writer(self) -> Any:
        if not self.recipe.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard is not installed: pip install 'ibisagent[train]', or set tensorboard = false"
            ) from error
        return SummaryWriter(str(self.recipe.out / "tensorboard"))

    def _new_state(self) -> State:
        recipe = self.recipe
        return new_state(
            self.pairs,
            self.weights,
            self.feature_cache,
            recipe.side,
            self.random,
            recipe.made_up,
            recipe.window,
            recipe.parts,
        )

    def _learn(self) -> float:
        """One step of the optimizer on a batch of the pool, whose episodes go on with the masks it gave."""
        recipe, random = self.recipe, self.random
        chosen = random.choice(len(self.pool), recipe.batch_size, replace=False)
        states = [self.pool[i] for i in chosen]
        inputs = self._tensor([state.network_input() for state in states])
        features = self._tensor([self.feature_cache.features[state.context] for state in states])
        features = F.dropout2d(features, FEATURE_DROPOUT)
        places = self._tensor([state.places for state in states])
        ground_truth = self._tensor([state.ground_truth[None] for state in states])
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits, quality = self.network(inputs.contiguous(memory_format=torch.channels_last), features, places)
        logits, quality = logits.float(), quality.float()
        inside = logits.detach() > 0
        reached = (inside & (ground_truth > 0)).sum((1, 2, 3)) / (inside | (ground_truth > 0)).sum((1, 2, 3)).clamp(
            min=1
        )
        loss = mask_loss(logits, ground_truth) + 0.2 * F.binary_cross_entropy_with_logits(quality, reached)
        self.descend(loss)
        probabilities = logits.detach().sigmoid()[:, 0].cpu().numpy()
        for index, probability in zip(chosen, probabilities, strict=True):
            if not self._goes_on(self.pool[index], probability):
                self.pool[index] = self._new_state()
        return loss.item()

    def _tensor(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays).astype(np.float32)).to(self.device)

    def _goes_on(self, state: State, probability: np.ndarray) -> bool:
        """Give an episode its new mask and, as a rule, the next click; False when it is over."""
        state.clicks_left -= 1
        if state.clicks_left < 0:
            return False
        state.probability = probability
        if self.random.random() < REPEATED_PASSES:
            state.probability = coarsened(probability, self.random)
            return True
        return correct(state, self.random)

    def _model(self) -> ClickModel:
        return ClickModel(TorchNetwork(deepcopy(self.average), str(self.device)), self.recipe.side, self.contexts)

    def _validate(self, count: int) -> dict[str, float] | None:
        """Mean IoU of held-out pairs after an expert's clicks, and in their true box."""
        if not count:
            return None
        model, clicks, boxes = self._model(), np.zeros(5), 0.0
        for pair in self.held_out[:count]:
            clicks += [reached for _, reached in expert_episode(model, pair, len(clicks))]
            box = bounding_box(pair.mask, TARGET)
            assert box is not None
            boxes += iou(IbisClickSession(Image(pair.pixels), model).predict([box]).mask, pair.mask)
        metrics = {f"IoU@{index + 1}": round(float(total) / count, 4) for index, total in enumerate(clicks)}
        return metrics | {"IoU box": round(boxes / count, 4)}

    def _quality_fit(self) -> tuple[float, float]:
        """Slope and shift that turn the quality logit into the IoU of held-out masks (Platt scaling)."""
        if not self.held_out:
            return 1.0, 0.0
        model = self._model()
        rows = [row for pair in self.held_out for row in expert_episode(model, pair, 10)]
        scores, reached = np.array(rows).clip(1e-4, 1 - 1e-4).T
        return fit_quality(np.log(scores / (1 - scores)), reached)


def sampling_weights(pairs: Sequence[Pair]) -> np.ndarray:
    """How often to draw each pair, summing to 1: balanced over data sets' objects, and over sizes, as small objects are
    rare and hard. Size: the octave of the share of the image that the mask covers."""
    groups = Counter(pair.group for pair in pairs)
    octaves = [round(math.log2(pair.mask.mean())) for pair in pairs]
    sizes = Counter(octaves)
    weights = np.array(
        [groups[pair.group] ** -0.6 * sizes[octave] ** -0.4 for pair, octave in zip(pairs, octaves, strict=True)]
    )
    return weights / weights.sum()


def expert_episode(model: ClickModel, pair: Pair, clicks: int) -> list[tuple[float, float]]:
    """(predicted IoU, IoU) after each of `clicks` expert clicks on a pair; repeats the last where nothing is wrong."""
    session, past, prior = IbisClickSession(Image(pair.pixels), model), list[Click](), None
    mask, rows = np.zeros_like(pair.mask), list[tuple[float, float]]()
    for _ in range(clicks):
        click = next_click(pair.mask, mask, TARGET, past)
        if click is not None:
            past.append(click)
            prediction = session.predict(past, prior)
            mask, prior = prediction.mask, prediction.logits
            rows.append((prediction.score, iou(mask, pair.mask)))
        else:
            rows.append(rows[-1])
    return rows


def fit_quality(logits: np.ndarray, reached: np.ndarray) -> tuple[float, float]:
    """(slope, shift) such that sigmoid(slope * logit + shift) predicts the IoU `reached`, by least cross-entropy."""
    from scipy.optimize import minimize

    def entropy(line: np.ndarray) -> float:
        z = line[0] * logits + line[1]
        return float(np.mean(np.logaddexp(0, z) - reached * z))

    slope, shift = minimize(entropy, np.array([1.0, 0.0])).x
    return round(float(slope), 4), round(float(shift), 4)


def mask_loss(logits: torch.Tensor, ground_truth: torch.Tensor) -> torch.Tensor:
    """Focal-weighted cross-entropy plus soft Dice; both (B, 1, S, S)."""
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, ground_truth, reduction="none")
    focus = (probability - ground_truth).abs().detach() + 0.1
    focal = (entropy * focus).sum(dim=(1, 2, 3)) / focus.sum(dim=(1, 2, 3))
    overlap = (probability * ground_truth).sum(dim=(1, 2, 3))
    total = probability.sum(dim=(1, 2, 3)) + ground_truth.sum(dim=(1, 2, 3))
    soft_dice = 1 - (2 * overlap + 1) / (total + 1)
    return (focal + soft_dice).mean()


def save_weights(network: ClickNetwork, out: Path, recipe: dict[str, Any], quality: tuple[float, float]) -> Path:
    """Write ibis-click.safetensors (float16) and ibis-click.json (shape, quality fit, recipe) to `out`."""
    from safetensors.torch import save_file

    tensors = {name: tensor.half().cpu().contiguous() for name, tensor in network.state_dict().items()}
    weights = out / "ibis-click.safetensors"
    with appearing_whole(weights) as part:
        save_file(tensors, part)
    description = {"network": network.config.to_dict(), "quality": quality, "trained": recipe}
    write_json(description, out / "ibis-click.json")
    return weights
