"""What every training run needs: a rate over time, an average of the weights, checkpoints, a report."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

import torch

from ibisagent.files import same_run

log = logging.getLogger(__name__)

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
            " figure; measure its weights with 'ibisagent eval run'",
            out,
        )


def rate_factor(step: int, warmup_steps: int, progress: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 2%. progress: 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * cosine)


@torch.no_grad()
def update_average(average: torch.nn.Module, network: torch.nn.Module, step: int, decay: float) -> None:
    """Move `average` towards `network`: an exponential moving average that forgets its start quickly."""
    weight = 1 - min(decay, step / (step + 10))
    for kept, fresh in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(fresh, weight)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings) to `path`, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, recipe: str) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, None if there is nothing.

    recipe: settings as JSON, to be compared with the checkpoint's own "recipe"; ConfigError where they differ.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    same_run(json.loads(state["recipe"]), json.loads(recipe), path)
    return state
