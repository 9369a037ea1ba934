"""What the training runs of the packaged networks share: a rate over time, an average of the weights, checkpoints."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ibisagent.errors import ConfigError
from ibisagent.files import appearing_whole, one_line, same_run

log = logging.getLogger(__name__)

MAX_GRAD_NORM = 1.0

Report = Callable[[int, Mapping[str, float], Mapping[str, float] | None], None]
"""Called after each step with the examples so far, the running losses, and the metrics of a validation if there was
one."""


def ignore_progress(done: int, losses: Mapping[str, float], metrics: Mapping[str, float] | None) -> None:
    """The report of a run that nobody follows."""


def warn_without_metrics(out: Path, held_out: Sized) -> None:
    """Say so where no patient is held out: then nothing tells how good the run's weights in `out` are."""
    if not len(held_out):
        log.warning(
            "%s: no patient is held out (one in sixteen is, by name; fill 'patient' of the data), so this run has no"
            " metrics; measure its weights with 'ibisagent eval run'",
            out,
        )


def rate_factor(step: int, warmup_steps: int, progress: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 2%. progress: 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * cosine)


def map_losses(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each cell, and 1 - soft Dice, of maps (N, H, W); wanted: shares in [0, 1]."""
    inside = logits.sigmoid()
    both, sums = (inside * wanted).sum((1, 2)), inside.sum((1, 2)) + wanted.sum((1, 2))
    return F.binary_cross_entropy_with_logits(logits, wanted), (1 - (2 * both + 1) / (sums + 1)).mean()


@torch.no_grad()
def update_average(average: torch.nn.Module, network: torch.nn.Module, step: int, decay: float) -> None:
    """Move `average` towards `network`: an exponential moving average that forgets its start quickly."""
    weight = 1 - min(decay, step / (step + 10))
    for kept, fresh in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(fresh, weight)


class TrainingRun:
    """One network that learns, its average, and where both are kept.

    A subclass sets recipe, network, average and learned_from, then calls `start`. recipe: a `NetworkRecipe` with an
    out. learned_from: hash of the images and masks, which must stay. goal: how many examples the run learns from.
    betas: of AdamW. free: settings that name this machine, so that a run may go on with others. parts: attributes whose
    states a checkpoint keeps.
    """

    parts: tuple[str, ...] = ("network", "average", "optimizer")
    recipe: Any
    network: torch.nn.Module
    average: torch.nn.Module
    optimizer: torch.optim.Optimizer
    learned_from: str
    goal: int
    average_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    free: frozenset[str]
    step = 0

    def start(self, parameters: Iterable[Any]) -> None:
        """Make the optimizer, and go on from the checkpoint, where there is one.

        parameters: as torch takes them; a group may have a "factor" of the learning rate. ConfigError where the
        checkpoint is of another recipe or other data.
        """
        recipe = self.recipe
        self.optimizer = torch.optim.AdamW(
            parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=self.betas, fused=True
        )
        if self._checkpoint.exists():
            self._resume()

    @property
    def examples(self) -> int:
        """How many the run has learned from."""
        return self.step * int(self.recipe.batch_size)

    @property
    def due(self) -> bool:
        """Whether the last step passed a multiple of `eval_every`: time to validate and to save."""
        every, batch = self.recipe.eval_every, self.recipe.batch_size
        return bool(self.examples // every > (self.examples - batch) // every)

    def descend(self, loss: torch.Tensor) -> None:
        """One step of the optimizer down `loss`, at the rate of the moment; the average follows."""
        factor = rate_factor(self.step, self.recipe.warmup_steps, self.examples / self.goal)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("factor", 1.0) * self.recipe.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.step += 1
        update_average(self.average, self.network, self.step, self.average_decay)

    def described(self) -> dict[str, Any]:
        """The recipe without what names this machine."""
        plain: dict[str, Any] = json.loads(self.recipe.model_dump_json(exclude=set(self.free)))
        return plain

    def save_checkpoint(self) -> None:
        """Write `OUT/checkpoint.pt`, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in self.parts}
        with appearing_whole(self._checkpoint) as part:
            facts = {"step": self.step, "recipe": json.dumps(self.described()), "learned_from": self.learned_from}
            try:
                torch.save({**state, **facts}, part)
            except RuntimeError as error:  # torch's own writer, where the disk is full
                raise OSError(one_line(error, 200)) from error

    def _resume(self) -> None:
        saved: dict[str, Any] = torch.load(self._checkpoint, weights_only=True, map_location="cpu")
        same_run(json.loads(saved["recipe"]), self.described(), self._checkpoint)
        if saved.get("learned_from", self.learned_from) != self.learned_from:
            raise ConfigError(
                f"{self._checkpoint}: images or masks of its data have changed since; put them back or give another out"
            )
        for name in self.parts:
            getattr(self, name).load_state_dict(saved[name])
        self.step = saved["step"]

    @property
    def _checkpoint(self) -> Path:
        return Path(self.recipe.out) / "checkpoint.pt"


def run_to_the_end(
    run: TrainingRun,
    learn: Callable[[], Mapping[str, float]],
    validate: Callable[[], Mapping[str, float] | None],
    report: Report,
) -> Iterator[None]:
    """Let `learn` take its steps until the goal; yields whenever it is time to save.

    report: told the mean losses since the last validation. validate: metrics on held-out patients, None for none.
    """
    shown, steps = Counter[str](), 0
    while run.examples < run.goal:
        shown.update(learn())
        steps += 1
        means = {name: round(total / steps, 3) for name, total in shown.items()}
        report(run.examples, means, validate() if run.due else None)
        if run.due:
            shown.clear()
            steps = 0
            yield
