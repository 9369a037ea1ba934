"""How experts learn and are checked: settings chosen by experiment (docs/experiments), which tests shorten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from ibisagent.config import NetworkRecipe


class TeachRecipe(NetworkRecipe):
    """How an expert learns. Chosen by experiment; nobody needs to change it, tests shorten it."""

    examples: int = Field(1_200, ge=1)
    """Maps to learn from, each of an object in a fresh view of an image: the length of the run."""
    batch_size: PositiveInt = 4
    learning_rate: PositiveFloat = 3e-4
    warmup_steps: PositiveInt = 20
    eval_every: PositiveInt = 240
    """Examples between two checkpoints."""
    adapter: dict[str, Any] = Field(default_factory=dict)
    """Settings of `SftRecipe` in place of those of `adapters`, for a model that is no ibis-nano."""
    folds: int = Field(3, ge=2)
    """Groups of patients of the self-check, at most."""
    workers: int = Field(1, ge=0)
    """Processes that learn, at most; one for each core at most. 0: none but the one that asks."""


class PartRecipe(TeachRecipe):
    """One run of a recipe: one expert."""

    out: Path
    seed: int
