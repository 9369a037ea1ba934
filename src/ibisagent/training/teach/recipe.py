"""How experts learn and are checked: settings chosen by experiment (docs/experiments), which tests shorten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from ibisagent.config import Recipe


class TeachRecipe(Recipe):
    """How an expert learns. Chosen by experiment; nobody needs to change it, tests shorten it."""

    examples: int = Field(1_200, ge=1)
    """Maps to learn from, each of an object in a fresh view of an image: the length of the run."""
    batch_size: int = Field(4, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_steps: int = Field(20, ge=1)
    eval_every: int = Field(240, ge=1)
    """Examples between two checkpoints."""
    adapter: dict[str, Any] = Field(default_factory=dict)
    """Settings of `SftRecipe` in place of those of `adapters`, for a model that is no ibis-nano."""
    folds: int = Field(3, ge=2)
    """Groups of patients of the self-check, at most."""
    workers: int = Field(2, ge=0)
    """Processes that learn, at most; one for each core at most. 0: none but the one that asks."""


class PartRecipe(TeachRecipe):
    """One run of a recipe: one expert."""

    out: Path
    seed: int
