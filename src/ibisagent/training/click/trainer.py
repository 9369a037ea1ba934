"""Trains `ibis-click`: `ibisagent train click recipes/ibis-click.toml`.

The training pass is also the step of the simulated episode (see `click_states`), so simulation costs nothing extra.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from ibisagent.config import Recipe
from ibisagent.domain import Click, Image
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.clicks import bounding_box, next_click
from ibisagent.imaging.masks import iou
from ibisagent.segmenters.click_network import ClickNetwork, ClickNetworkConfig
from ibisagent.segmenters.context_features import GlanceEncoder, Glances
from ibisagent.segmenters.ibis_click import IbisClickSession, Sight, read_click_network
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
from ibisagent.training.loop import Report, load_checkpoint, rate_factor, save_checkpoint, unheard, update_average
from ibisagent.training.views import Bank

FORGOTTEN = 0.1  # of the glance's channels in each example, against learning pictures by heart
SECOND_LOOKS = 0.15  # of the steps of an episode bring no click, only the mask of the look before


class ClickRecipe(Recipe):
    """How to train a click network."""

    data: Path
    """Folder in BiomedParse's layout, or a manifest; pictures are kept in memory."""
    out: Path
    """Folder for checkpoint, weights and logs; a run that was stopped goes on from there."""
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
    batch: int = Field(16, ge=1)
    rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.02, ge=0)
    warm_up: int = Field(200, ge=1)
    average_decay: float = Field(0.999, ge=0, lt=1)
    made_up: float = Field(0.15, ge=0, le=1)
    """Share of targets that are superpixels instead of labelled objects."""
    window: float = Field(0.7, ge=0, le=1)
    """Share of views that are windows on the object instead of whole pictures."""
    bank: Path | None = None
    """Folder for the glances at the training pictures (0.4 MB a view), to share it between runs; none means `out`."""
    rounds: int = Field(5, ge=1)
    """Views of each picture that are glanced at: the plain one and augmented ones."""
    look_every: int = Field(8_000, ge=1)
    """States between two looks at the patients held out for choosing settings (one in sixteen)."""
    seed: int = 0
    device: str = "auto"
    tensorboard: bool = True


def train(recipe: ClickRecipe, report: Report = unheard) -> Path:
    """Train as `recipe` says, going on from its checkpoint if there is one; returns the weights file.

    A run that was interrupted sees other random views than one that was not: its weights differ slightly.
    Raises ConfigError for a checkpoint of another recipe, DataError where there is nothing to train on.
    """
    from ibisagent.datasets import read_cases

    licences = {recipe.licence_class} if recipe.licence_class else None
    source = read_cases(recipe.data, split="train", licence_classes=licences)
    cases = [case for case in source if case.meta.get("dataset") not in recipe.leave_out]
    if all(is_development(case.patient) for case in cases):
        raise DataError(f"{recipe.data}: no training pair is left after licence_class, leave_out and held-out patients")
    recipe.out.mkdir(parents=True, exist_ok=True)
    bank = Bank.of(cases, recipe.bank or recipe.out, recipe.rounds, recipe.seed)
    pairs = pairs_from((case for case in cases if not is_development(case.patient)), bank.place)
    held_out = pairs_from((case for case in cases if is_development(case.patient)), bank.place)
    return _Run(recipe, pairs, held_out, bank).go(report)


class _Run:
    """One training run: network, average, optimizer, and a pool of episodes three batches deep."""

    def __init__(self, recipe: ClickRecipe, pairs: Sequence[Pair], held_out: Sequence[Pair], bank: Bank) -> None:
        self.recipe, self.pairs, self.held_out, self.bank = recipe, pairs, held_out, bank
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
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay)
        self.glances = Glances(GlanceEncoder(device=str(self.device)))
        counts = Counter(pair.group for pair in pairs)
        weights = np.array([counts[pair.group] ** -0.6 for pair in pairs])
        self.weights = weights / weights.sum()
        self.step = 0
        self._resume()
        self.random = np.random.default_rng([recipe.seed, self.step])
        self.pool = [self._new_state() for _ in range(3 * recipe.batch)]

    def go(self, report: Report) -> Path:
        """Train to the end and write the weights."""
        recipe, running = self.recipe, 0.0
        writer = self._writer()
        while self.step * recipe.batch < recipe.states:
            loss = self._learn()
            running = 0.98 * running + 0.02 * loss if running else loss
            states = self.step * recipe.batch
            looks = states // recipe.look_every > (states - recipe.batch) // recipe.look_every
            figures = self._look(min(60, len(self.held_out))) if looks else None
            if figures is not None:
                save_checkpoint(self._checkpoint, self._state())
            if writer is not None and (looks or self.step % 20 == 0):
                for name, figure in {"loss": running, **(figures or {})}.items():
                    writer.add_scalar(name, figure, states)
            report(states, {"loss": running}, figures)
        save_checkpoint(self._checkpoint, self._state())
        return save_weights(self.average, recipe.out, self._described(), self._quality_fit())

    @property
    def _checkpoint(self) -> Path:
        return self.recipe.out / "checkpoint.pt"

    def _described(self) -> dict[str, Any]:
        """The recipe without what names this machine."""
        return json.loads(self.recipe.model_dump_json(exclude={"data", "out", "bank", "start", "device"}))

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "recipe": json.dumps(self._described()),
        }

    def _resume(self) -> None:
        saved = load_checkpoint(self._checkpoint, json.dumps(self._described()))
        if saved is None:
            return
        self.network.load_state_dict(saved["network"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]

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
        return new_state(self.pairs, self.weights, self.bank, recipe.side, self.random, recipe.made_up, recipe.window)

    def _learn(self) -> float:
        """One step of the optimizer on a batch of the pool, whose episodes go on with the masks it gave."""
        recipe, random = self.recipe, self.random
        chosen = random.choice(len(self.pool), recipe.batch, replace=False)
        states = [self.pool[i] for i in chosen]
        inputs = self._tensor([state.network_input() for state in states])
        features = self._tensor([self.bank.features[state.glance] for state in states])
        features = F.dropout2d(features, FORGOTTEN)
        places = self._tensor([state.places for state in states])
        truth = self._tensor([state.truth[None] for state in states])
        for group in self.optimizer.param_groups:
            progress = self.step * recipe.batch / recipe.states
            group["lr"] = recipe.rate * rate_factor(self.step, recipe.warm_up, progress)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits, quality = self.network(inputs.contiguous(memory_format=torch.channels_last), features, places)
        logits, quality = logits.float(), quality.float()
        inside = logits.detach() > 0
        reached = (inside & (truth > 0)).sum((1, 2, 3)) / (inside | (truth > 0)).sum((1, 2, 3)).clamp(min=1)
        loss = mask_loss(logits, truth) + 0.2 * F.binary_cross_entropy_with_logits(quality, reached)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        update_average(self.average, self.network, self.step, recipe.average_decay)
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
        if self.random.random() < SECOND_LOOKS:
            state.probability = coarsened(probability, self.random)
            return True
        return correct(state, self.random)

    def _sight(self) -> Sight:
        return Sight(TorchNetwork(deepcopy(self.average), str(self.device)), self.recipe.side, self.glances)

    def _look(self, count: int) -> dict[str, float] | None:
        """Mean IoU of held-out pairs after an expert's clicks, and in their true box."""
        if not count:
            return None
        sight, clicks, boxes = self._sight(), np.zeros(5), 0.0
        for pair in self.held_out[:count]:
            clicks += [reached for _, reached in expert_episode(sight, pair, len(clicks))]
            box = bounding_box(pair.mask, TARGET)
            assert box is not None
            boxes += iou(IbisClickSession(Image(pair.pixels), sight).predict([box]).mask, pair.mask)
        figures = {f"IoU@{index + 1}": round(float(total) / count, 4) for index, total in enumerate(clicks)}
        return figures | {"IoU box": round(boxes / count, 4)}

    def _quality_fit(self) -> tuple[float, float]:
        """Slope and shift that turn the quality logit into the IoU of held-out masks (Platt scaling)."""
        if not self.held_out:
            return 1.0, 0.0
        sight = self._sight()
        rows = [row for pair in self.held_out for row in expert_episode(sight, pair, 10)]
        scores, reached = np.array(rows).clip(1e-4, 1 - 1e-4).T
        return fit_quality(np.log(scores / (1 - scores)), reached)


def expert_episode(sight: Sight, pair: Pair, clicks: int) -> list[tuple[float, float]]:
    """(predicted IoU, IoU) after each of `clicks` expert clicks on a pair; repeats the last where nothing is wrong."""
    session, past, prior = IbisClickSession(Image(pair.pixels), sight), list[Click](), None
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


def save_weights(network: ClickNetwork, out: Path, recipe: dict[str, Any], quality: tuple[float, float]) -> Path:
    """Write ibis-click.safetensors (float16) and ibis-click.json (shape, quality fit, recipe) to `out`."""
    from safetensors.torch import save_file

    tensors = {name: tensor.half().cpu().contiguous() for name, tensor in network.state_dict().items()}
    weights = out / "ibis-click.safetensors"
    temporary = weights.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, weights)
    description = {"network": network.config.to_dict(), "quality": quality, "trained": recipe}
    (out / "ibis-click.json").write_text(json.dumps(description, indent=1) + "\n")
    return weights
